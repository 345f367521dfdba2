"""A training of a LoRA on a transformer so small that a step takes milliseconds, and its end at any moment.

python lora_training.py kill FOLDER MOMENTS IN_A_ROW     kills trainings, see `kill_and_compare`
torchrun lora_training.py share FOLDER OUTPUT            trains on batches of 3, which processes share
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from flux import specs
from flux.model import Flux
from flux.settings.files import check_settings
from flux.settings.train import TrainSettings
from helpers import tiny_models, weight_files

TRIGGER = "flower bell"
WHOLE = specs.configs["flux-nano"]
PARAMS = replace(
    WHOLE.params,
    hidden_size=64,
    num_heads=2,
    axes_dim=[8, 12, 12],
    depth=2,
    depth_single_blocks=2,
)
SPEC = replace(WHOLE, params=PARAMS, size=64, num_steps=2, vital_layers=(2, 1))
SAME = ("lora.safetensors", "lora_000006.safetensors", "state.safetensors", "curves.csv")
"""Files that must not depend on where a training was killed."""


@contextmanager
def tiny_nano() -> Iterator[None]:
    """Gives flux-nano the tiny transformer's sizes within the block. Its other models stay as they are."""
    specs.configs["flux-nano"] = SPEC
    try:
        yield
    finally:
        specs.configs["flux-nano"] = WHOLE


def write_images(folder: Path) -> Path:
    """Four small images in two shapes, with captions."""
    folder.mkdir(parents=True)
    for number, (width, colour) in enumerate(((64, "red"), (64, "blue"), (128, "green"), (64, "white"))):
        image = Image.new("RGB", (width, 64), "gray")
        ImageDraw.Draw(image).ellipse((10, 10, 40 + 4 * number, 50), fill=colour)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a [trigger] on the {('grass', 'snow')[number % 2]}")
    return folder


def write_base(folder: Path) -> Path:
    """The tiny transformer's file."""
    weights = tiny_models.randomized(Flux(PARAMS), 0).state_dict()
    return weight_files.save(weights, folder / "tiny.safetensors")


def settings(folder: Path, output: str = "out", **fields: Any) -> TrainSettings:
    """Settings of a training in this folder, whose images and base are written if they are not there."""
    images, base = folder / "images", folder / "tiny.safetensors"
    if not images.exists():
        write_images(images)
    if not base.exists():
        write_base(folder)
    usual = {
        "images": str(images), "weights": str(base), "trigger": TRIGGER, "rank": 4, "sizes": [96],
        "learning_rate": 1e-2,
        "steps": 12, "save_every": 3, "sample_every": 5, "sample_prompts": ["a [trigger] on the grass"],
        "device": "cpu", "output_dir": str(folder / output),
    }  # fmt: skip
    return check_settings(TrainSettings, {**usual, **fields})


def in_child(given: TrainSettings, seconds: float | None = None) -> float:
    """Train in a process of its own, which is killed after so many seconds. Returns how long it ran."""
    from flux.lora.train import train

    begin, child = time.perf_counter(), os.fork()
    if child == 0:
        status = 1
        try:
            train(given)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is None:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return time.perf_counter() - begin


def kill_and_compare(folder: Path, moments: int, in_a_row: int = 1) -> None:
    """Kill a training, resume it, and compare its files with those of one that ran through.

    Args:
        folder: Where to train.
        moments: Number of kills.
        in_a_row: How often each training is killed before it may end.
    """
    rng, whole = random.Random(0), settings(folder, "whole")
    in_child(whole)  # files that are read for the first time take longer
    for path in Path(whole.output_dir).rglob("*"):
        if path.is_file():
            path.unlink()
    seconds = in_child(whole)
    for number in range(0, moments, in_a_row):
        given = settings(folder, f"killed_{number}")
        for _ in range(in_a_row):
            in_child(given, rng.uniform(0, seconds))
        in_child(given)
        for name in SAME:
            expected, got = (Path(each.output_dir, name).read_bytes() for each in (whole, given))
            assert got == expected, f"{name} differs after kill {number}"
        left = [path.name for path in Path(given.output_dir).rglob(".flux-*")]
        assert not left, left


def kill(folder: str, moments: str, in_a_row: str) -> None:
    models = (f"transformers.models.{name}.modeling_{name}" for name in ("clip", "dinov2", "t5"))
    for name in ("flux.lora.train", "matplotlib.backends.backend_agg", *models):
        import_module(name)  # once, not in each child
    kill_and_compare(Path(folder), int(moments), int(in_a_row))


def share(folder: str, output: str) -> None:
    from flux.lora.train import train

    count = int(os.environ.get("WORLD_SIZE", "1"))
    train(settings(Path(folder), output, batch_size=3, parallel=count))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tiny_nano():
        {"kill": kill, "share": share}[sys.argv[1]](*sys.argv[2:])
