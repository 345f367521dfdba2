"""A benchmark of four items, and evaluations without a model."""

import pytest
from helpers.evaluation import PaintingWorker, write_squares

import flux.evaluate.run


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture
def painting(monkeypatch):
    monkeypatch.setattr(flux.evaluate.run, "EvaluateWorker", PaintingWorker)
    monkeypatch.setattr(PaintingWorker, "made", [])
    return PaintingWorker.made
