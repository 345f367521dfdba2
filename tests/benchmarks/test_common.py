"""The plan of the full size."""

import torch

from benchmarks.common import full_plan
from benchmarks.random_weights import random_transformer


def test_the_full_size_is_flux_dev():
    """1080x720 is rounded down, and the shapes that would be written are those of flux1-dev.safetensors."""
    plan = full_plan()
    assert plan.model == "flux-dev"
    assert len(plan.layers) == 10
    assert {(work.width, work.height) for work in plan.work} == {(1024, 1024), (1072, 720)}
    weights = random_transformer(plan.spec.params, torch.device("meta"))
    assert sum(tensor.numel() for tensor in weights.values()) == 11_901_408_320
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
