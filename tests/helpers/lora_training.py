"""A training of a LoRA on a transformer so small that a step takes milliseconds, and its end at any moment.

python lora_training.py kill FOLDER MOMENTS IN_A_ROW     kills trainings, see `kill_and_compare`
python lora_training.py share FOLDER OUTPUT COUNT        trains in so many processes, see `share`
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from flux import specs
from flux.lora.train import train
from flux.model import Flux
from flux.settings.files import check_settings
from flux.settings.train import TrainSettings
from helpers import tiny_models, weight_files
from helpers.forks import fork, run_together, wait_for

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
SAME = ("lora.safetensors", "lora_000006.safetensors", "state.safetensors", "curves.csv", "curves.png")
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


def kill_and_compare(folder: Path, moments: int, in_a_row: int = 1) -> None:
    """Kill a training, resume it, and compare its files with those of one that ran through.

    Args:
        folder: Where to train.
        moments: Number of kills.
        in_a_row: How often each training is killed before it may end.
    """
    fields = {"sample_every": 12}
    rng, whole = random.Random(0), settings(folder, "whole", **fields)
    begin = time.perf_counter()
    wait_for(fork(partial(train, whole)))
    seconds = time.perf_counter() - begin
    for number in range(0, moments, in_a_row):
        given = settings(folder, f"killed_{number}", **fields)
        for _ in range(in_a_row):
            child = fork(partial(train, given))
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        wait_for(fork(partial(train, given)))
        for name in SAME:
            expected, got = (Path(each.output_dir, name).read_bytes() for each in (whole, given))
            assert got == expected, f"{name} differs after kill {number}"
        left = [path.name for path in Path(given.output_dir).rglob(".flux-*")]
        assert not left, left


def share(folder: Path, output: str, count: int) -> None:
    """Train on batches of three in so many processes, as torchrun starts them."""
    given = settings(folder, output, batch_size=3, parallel=count, sample_prompts=[], steps=6)
    run_together(partial(train, given), count)


if __name__ == "__main__":
    models = (f"transformers.models.{name}.modeling_{name}" for name in ("clip", "dinov2", "t5"))
    for name in ("matplotlib.backends.backend_agg", *models):
        import_module(name)  # once, not in each child
    torch.set_num_threads(1)
    work, folder = sys.argv[1], Path(sys.argv[2])
    with tiny_nano():
        if work == "kill":
            kill_and_compare(folder, int(sys.argv[3]), int(sys.argv[4]))
        else:
            share(folder, sys.argv[3], int(sys.argv[4]))
