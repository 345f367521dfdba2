"""The benchmark's writer of GGUF's blocks of 256: as good as plain rounding to so many bits can be."""

import gguf
import numpy as np
import pytest

from benchmarks.k_quants import KINDS, quantize

# Relative root-mean-square error on normal numbers, and a fifth more.
ERRORS = {"Q2_K": 0.36, "Q3_K": 0.21, "Q4_K": 0.085, "Q5_K": 0.042, "Q6_K": 0.022}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_back(kind):
    x = np.random.default_rng(0).normal(0, 0.02, (8, 512)).astype(np.float32)
    x[0, :256] = 0
    back = gguf.dequantize(quantize(x, kind), gguf.GGMLQuantizationType[kind])
    error = np.sqrt(np.square(back - x).mean() / np.square(x).mean())
    assert back.shape == x.shape
    assert not back[0, :256].any()
    assert error < ERRORS[kind], error
