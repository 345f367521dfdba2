"""Scores made up for tests."""

import numpy as np

from flux.scan.scores import Scores


def table(*vitalities: float, rows: int = 1) -> Scores:
    """Single layers 0, 1, ... of these vitalities, every row the same."""
    sets = [(layer,) for layer in range(len(vitalities))]
    return Scores(sets, {"dino": 1 - np.array([vitalities] * rows)})


def scattered(truth, rows: int, spread: float, sets=None, prompts=None) -> Scores:
    """Vitalities that scatter normally about their truth from row to row."""
    truth = np.asarray(truth)
    values = truth + spread * np.random.default_rng(5).standard_normal((rows, len(truth)))
    return Scores(sets or [(layer,) for layer in range(len(truth))], {"dino": 1 - values}, prompts)


TABLE = Scores(
    [(0,), (1, 2), (2,), (1,)],
    {
        "dino": np.array([[0.9, 0.1, 0.8, 0.5], [0.7, 0.1, 1.0, 0.7]]),
        "psnr": np.array([[20.0, 100, 40, 20], [40, 100, 40, 20]]),
    },
)
