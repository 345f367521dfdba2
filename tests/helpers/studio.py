"""A studio of the small model, a classifier for its content filter, and runs to their end."""

import runpy
from pathlib import Path

import numpy as np
import torch

from flux.images.io import read_image
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import configs
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Sessions
from flux.studio.state import Studio

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"width": 64, "height": 64, "num_steps": 2}


def make_studio(nano, folder: Path) -> Studio:
    """A studio whose images are small, and that writes to that folder."""
    settings = resolve(ModelSettings(device="cpu", dtype="float32", **SMALL))
    limits = Limits.of(configs["flux-nano"])
    return Studio(Engine(settings, nano), limits, Sessions(folder / "visits"), folder)


def make_classifier(folder: Path, labels=("normal", "nsfw"), says=1) -> str:
    """A tiny vision transformer in that folder that gives every image the same label."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = ViTForImageClassification(config)
    model.classifier.bias.data = 20.0 * torch.nn.functional.one_hot(torch.tensor(says), len(labels))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def finish(updates):
    """The run, once its updates have ended."""
    return [run for _, run in updates][-1]


def run_demo(name: str, record: Path, out: Path, **more) -> Path:
    """Runs a demo with a run.json, and returns the folder that it wrote to."""
    main = runpy.run_path(str(ROOT / f"{name}.py"))["main"]
    main(str(record), output_dir=str(out), **more)
    return out


def assert_same_image(a: Path, b: Path) -> None:
    assert np.array_equal(np.asarray(read_image(a)), np.asarray(read_image(b)))
