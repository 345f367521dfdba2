"""What the studio's tests share: a studio of the small model, and a classifier for its content filter."""

from pathlib import Path

import torch

from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import configs
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Visits
from flux.studio.state import Studio

SMALL = {"width": 64, "height": 64, "num_steps": 2}


def make_studio(nano, folder: Path) -> Studio:
    """A studio whose pictures are small, with all that it writes in that folder."""
    settings = resolve(ModelSettings(device="cpu", dtype="float32", **SMALL))
    return Studio(Engine(settings, nano), Limits.of(configs["flux-nano"]), Visits(folder / "visits"), folder)


def make_classifier(folder: Path, labels=("normal", "nsfw"), says=1) -> str:
    """A tiny vision transformer in that folder that says one thing of every picture."""
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
    net = ViTForImageClassification(config)
    net.classifier.bias.data = 20.0 * torch.nn.functional.one_hot(torch.tensor(says), len(labels))
    net.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
