"""Training needs gradients; the tokenizers are learned once."""

from pathlib import Path

import pytest
import torch


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
