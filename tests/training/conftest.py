"""Training needs gradients; tokenizers, a benchmark and a judge are made once."""

from pathlib import Path

import pytest
import torch
from helpers.evaluation import RENDERED_EDITS, SIDE


@pytest.fixture(autouse=True)
def no_gradients():
    """Takes the place of the fixture that turns gradients off everywhere else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> Path:
    from training.stages.tokenizers import write_tokenizers

    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return folder


@pytest.fixture(scope="session")
def rendered_edits(tmp_path_factory) -> Path:
    """The folder of a small benchmark."""
    from training.benchmark import write

    folder = tmp_path_factory.mktemp("rendered")
    write(folder, RENDERED_EDITS, SIDE)
    return folder


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory) -> Path:
    """A measuring model that has learned nothing, as training leaves it."""
    from training.loop.models import TOY
    from training.stages.vision import MeasuringModel

    path = tmp_path_factory.mktemp("judge") / "measuring.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({name: x.half() for name, x in MeasuringModel(TOY).state_dict().items()}, path)
    return path
