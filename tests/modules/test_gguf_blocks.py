"""Packed blocks expand to the right shapes. `tests/weights/test_gguf.py` compares their numbers."""

import pytest
import torch
from helpers import weight_files
from hypothesis import given, settings
from hypothesis import strategies as st

from flux.modules.gguf_blocks import BLOCKS, expand

sizes = given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
quick = settings(max_examples=20)


@pytest.mark.parametrize("kind", BLOCKS)
@sizes
@quick
def test_rows_of_blocks_expand_to_rows_of_numbers(kind, rows, blocks, seed):
    numbers, nbytes = BLOCKS[kind]
    packed = torch.from_numpy(weight_files.random_blocks(rows, blocks * numbers, kind, seed))
    assert packed.shape == (rows, blocks * nbytes)
    expanded = expand(packed, kind)
    assert expanded.dtype == torch.float32
    assert expanded.shape == (rows, blocks * numbers)
    assert expanded.isfinite().all()


@pytest.mark.parametrize("kind", BLOCKS)
@sizes
@quick
def test_a_block_is_expanded_by_itself(kind, rows, blocks, seed):
    numbers, nbytes = BLOCKS[kind]
    packed = torch.from_numpy(weight_files.random_blocks(rows, blocks * numbers, kind, seed))
    by_block = [expand(block.contiguous(), kind) for block in packed.split(nbytes, dim=1)]
    assert torch.equal(torch.cat(by_block, dim=1), expand(packed, kind))


@pytest.mark.parametrize("kind", BLOCKS)
@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 7), count=st.integers(1, 8))
@quick
def test_rows_expand_by_themselves(kind, seed, start, count):
    packed = torch.from_numpy(weight_files.random_blocks(8, BLOCKS[kind][0], kind, seed))
    rows = slice(start, start + count)
    assert torch.equal(expand(packed[rows], kind), expand(packed, kind)[rows])
