"""diffusers' transformer on our weights."""

import torch

from benchmarks.common import toy_plan
from benchmarks.diffusers_models import to_diffusers_names
from benchmarks.random_weights import random_transformer


def test_renaming_shares_memory():
    """Two transformers of 24 GB each would not fit on most GPUs: only the swapped modulation is a copy."""
    params = toy_plan().spec.params
    weights = random_transformer(params, torch.device("cpu"))
    own = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    copies = [name for name, tensor in to_diffusers_names(weights, params.hidden_size).items()
              if tensor.untyped_storage().data_ptr() not in own]  # fmt: skip
    assert sorted(copies) == ["norm_out.linear.bias", "norm_out.linear.weight"]
