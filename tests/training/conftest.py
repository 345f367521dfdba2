"""Training needs gradients; tokenizers, a benchmark and a judge are made once."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.evaluation import RENDERED_EDITS, SIDE
from helpers.training import MOMENT


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


@pytest.fixture(scope="session")
def work(tokenizers, tmp_path_factory):
    """All stages done, one or two iterations each."""
    from training.loop.cluster import Cluster
    from training.loop.plan import ADAPTERS, Work
    from training.loop.trainer import Budget
    from training.stages.adapters import train_adapter
    from training.stages.autoencoder import train_autoencoder
    from training.stages.export import export
    from training.stages.flow import train_flow, train_guidance
    from training.stages.schnell import train_schnell
    from training.stages.text import train_text
    from training.stages.vision import train_dinov2, train_measuring

    folder = tmp_path_factory.mktemp("training")
    (folder / "tokenizers").symlink_to(tokenizers)
    work = replace(Work.toy(Cluster.join(), folder, Budget(60, time.time())), plan=MOMENT, side=32)
    assert train_autoencoder(work)
    assert train_text(work)
    assert train_flow(work, "flow128")
    assert train_flow(work, "flow256")
    assert train_guidance(work)
    assert train_schnell(work)
    assert all(train_adapter(work, kind) for kind in ADAPTERS)
    assert train_dinov2(work)
    assert train_measuring(work)
    assert export(work)
    return work
