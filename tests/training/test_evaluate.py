"""Scores of samples."""

import torch
from helpers.training import perfect

from training.evaluate import ExportedModels, evaluate_samples, generate_images, score_samples, table
from training.stages.vision import Recognition, load_measuring


def test_samples_are_scored(work, tmp_path):
    models = ExportedModels(work, work.folder / "assets")
    result = {
        "samples": evaluate_samples(models, load_measuring(work), tmp_path, count=8, side=work.side, steps=2)
    }
    assert (tmp_path / "samples_nano.png").exists()
    assert "| background |" in table(result)
    images = generate_images(models, models.flux("schnell"), "schnell", ["a dog", "a cat"], work.side, 4)
    assert images.shape == (2, 3, work.side, work.side)
    assert images.min() >= 0
    assert images.max() <= 1


def test_perfect_sight_scores_one():
    import random

    from training.scenes.compose import sample

    scenes = [sample(random.Random(seed)) for seed in range(300)]
    assert set(score_samples(perfect(scenes), scenes).values()) == {1.0}
    blind = Recognition(*(torch.zeros_like(value) for value in vars(perfect(scenes)).values()))
    assert score_samples(blind, scenes)["objects, recall"] == 0
