"""Evaluations in small: a benchmark of coloured squares, settings for it, and a worker without a model."""

import csv
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from flux.evaluate.benchmark import encode_mask, write_benchmark
from flux.evaluate.methods import EditResult
from flux.evaluate.run import EditTask
from flux.evaluate.settings import EvaluateSettings
from flux.images.io import save_image
from flux.settings.files import check_settings

SIDE = 64
RENDERED_EDITS = 14  # of the benchmark of scenes
INSTRUCTIONS = {"replace": "replace the dog with a cat", "add": "add a dog"}
PROMPTS = {"replace": ("a dog on the grass", "a cat on the grass"), "add": ("a car", "a car and a dog")}


def write_squares(folder: Path) -> Path:
    """Writes four items of two kinds: a coloured square on noise, which may change and turns white."""
    random = np.random.default_rng(0)
    entries = []
    for number in range(4):
        kind = list(PROMPTS)[number % 2]
        pixels = random.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8).repeat(1, axis=0)
        pixels[16:48, 16:48] = random.integers(0, 256, 3)
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[16:48, 16:48] = True
        truth = np.where(mask[..., None], np.uint8(255), pixels)
        names = [f"{number}.png", f"{number}_target.png"]
        for name, image in zip(names, (pixels, truth)):
            save_image(Image.fromarray(image), folder / "annotation_images" / name)
        entry = {
            "image_path": names[0],
            "target_image_path": names[1],
            "original_prompt": PROMPTS[kind][0],
            "editing_prompt": PROMPTS[kind][1],
            "editing_instruction": INSTRUCTIONS[kind],
            "editing_type_id": "1" if kind == "replace" else "2",
            "mask": encode_mask(mask),
            "seed": number,
        }
        entries.append((f"{number:03d}", entry))
    write_benchmark(folder, entries)
    return folder


def settings_of(benchmark, folder, **more) -> EvaluateSettings:
    """Settings of a small evaluation, with these fields changed."""
    fields = {
        "benchmark": str(benchmark),
        "output_dir": str(folder),
        "methods": [{"name": "Default"}, {"name": "img2img", "strength": 0.5}],
        "metrics": [],
        "device": "cpu",
        "width": SIDE,
        "height": SIDE,
        "num_steps": 2,
        "batch_size": 3,
    }
    return check_settings(EvaluateSettings, fields | more)


class PaintingWorker:
    """Stands for the model: every edit is its photograph, darker. It notes its tasks in `made`."""

    made: ClassVar[list[EditTask]] = []

    def __init__(self, settings, pipe=None, opened=None):
        self.settings = settings

    def run(self, task: EditTask) -> list[EditResult]:
        type(self).made.append(task)
        generated = self.settings.references == "generated"
        photos = [item.photo(SIDE, SIDE) for item in task.items]
        return [
            EditResult(photo.point(lambda v: v // 2), photo if generated else None, 0.25, 7.0)
            for photo in photos
        ]


def results(folder) -> list[dict]:
    """The rows of its results.csv."""
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))
