"""Safetensors files whose bytes depend on nothing but what they hold."""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load

from flux.weights.checkpoint import open_checkpoint
from flux.weights.save import safetensors_bytes

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.tensor([0.1], dtype=torch.float64),
    "turned": torch.arange(6.0).view(2, 3).T,
    "empty": torch.zeros(0, 4),
}
METADATA = {name: f"text {name} é" for name in "abcdefgh"}


def test_others_read_it(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, METADATA))
    held = load(path.read_bytes())
    assert held.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert held[name].dtype == x.dtype
        assert torch.equal(held[name], x)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    assert open_checkpoint(path).metadata == METADATA
    assert load(safetensors_bytes(TENSORS)).keys() == TENSORS.keys()


def test_the_same_bytes_in_another_process():
    """safetensors' own function orders the metadata anew in each."""
    program = "import hashlib; from test_save import *; print(digest())"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


def digest() -> str:
    return hashlib.sha256(safetensors_bytes(TENSORS, METADATA)).hexdigest()
