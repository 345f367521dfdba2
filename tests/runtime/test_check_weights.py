"""Weights that fit nowhere: told in one line before any is loaded."""

import pytest
import torch
from helpers import full_size

from flux.errors import InputError
from flux.runtime import plan
from flux.runtime.devices import main_memory
from flux.runtime.plan import ALL_BLOCKS, GIB, Plan, check_weights, make_plan
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.weights.find import find_model

NONE, MODEL = Plan("none", 0, 0, False), Plan("model", 0, 0, False)
BLOCKS = Plan("blocks", ALL_BLOCKS, ALL_BLOCKS, False)


@pytest.mark.parametrize(
    ("where", "gib", "fits"),
    [(NONE, 40, True), (NONE, 30, False), (MODEL, 24, True), (MODEL, 16, False), (BLOCKS, 8, True)],
)
def test_weights_on_a_gpu(monkeypatch, where, gib, fits):
    """In bf16, all take 31 GiB, the transformer alone takes 22."""
    monkeypatch.setattr(plan, "main_memory", lambda: 64 * GIB)
    dev = full_size.estimator()
    if fits:
        check_weights(where, dev, gib * GIB)
        return
    expected = rf'Got {gib}.0 GiB of free memory on the GPU for weights of \d+\.\d GiB: give offload "auto"$'
    with pytest.raises(InputError, match=expected):
        check_weights(where, dev, gib * GIB)


@pytest.mark.parametrize(
    ("where", "free", "fields", "needed"),
    [
        (NONE, None, {}, 31.4),
        (MODEL, 24 * GIB, {}, 31.4),
        (NONE, 80 * GIB, {}, None),
        (NONE, 80 * GIB, {"quantize": "8bit"}, 22.2),
        (NONE, 80 * GIB, {"t5": "cpu"}, None),
    ],
    ids=["on a CPU", "waiting", "on the GPU", "quantised from main memory", "T5 alone"],
)
def test_weights_in_main_memory(monkeypatch, where, free, fields, needed):
    """Only what passes through it counts, in the form in which it is loaded."""
    dev = full_size.estimator(**fields)
    monkeypatch.setattr(plan, "main_memory", lambda: 16 * GIB)
    if needed is None:
        check_weights(where, dev, free)
        return
    with pytest.raises(
        InputError, match=rf"take {needed} GiB of main memory, and this machine has 16\.0: take"
    ):
        check_weights(where, dev, free)
    monkeypatch.setattr(plan, "main_memory", lambda: 32 * GIB)
    check_weights(where, dev, free)


def test_the_check_is_part_of_planning(monkeypatch):
    monkeypatch.setattr(plan, "main_memory", lambda: 2**20)
    settings = resolve(ModelSettings(device="cpu"))
    with pytest.raises(InputError, match="GiB of main memory"):
        make_plan(settings, find_model(settings), torch.float32, torch.float32, torch.device("cpu"))


def test_memory_of_this_machine(monkeypatch):
    assert (main_memory() or GIB) >= GIB
    monkeypatch.setattr("sys.platform", "darwin")
    assert main_memory() is None
