"""Damage that headers do not show: numbers that are NaN or infinite."""

from pathlib import Path

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules import gguf_blocks
from flux.modules.float8 import EIGHT_BIT_FLOATS

# The smallest byte, sign aside, that is no finite number. E4M3 has one NaN, E5M2 infinities and NaNs.
NOT_FINITE = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}


class FiniteCheck:
    """Checks tensors where they are. The device is asked once, at the end, so that it need not wait."""

    def __init__(self) -> None:
        self._flags: list[Tensor] = []
        self._origins: list[tuple[str, Path]] = []

    def add(self, name: str, path: Path, x: Tensor) -> None:
        """Check a plain tensor.

        Args:
            name: Its name, for the message.
            path: Its file.
            x: Its values.
        """
        if x.numel() and x.is_floating_point():
            low, high = x.aminmax()  # one pass without a copy; NaN is passed on
            self._add(name, path, low.isfinite() & high.isfinite())

    def add_packed(self, name: str, path: Path, packed: Tensor, kind: str) -> None:
        """Check a matrix in 8-bit floats or in GGUF's blocks, given as bytes."""
        if kind in EIGHT_BIT_FLOATS and packed.numel():
            self._add(name, path, (packed & 0x7F).amax() < NOT_FINITE[kind])
        elif kind in gguf_blocks.BLOCKS and packed.numel():
            self._add(name, path, gguf_blocks.is_finite(packed, kind))

    def _add(self, name: str, path: Path, is_finite: Tensor) -> None:
        self._flags.append(is_finite)
        self._origins.append((name, path))

    def finish(self, dtype: torch.dtype) -> None:
        """Wait for the answers.

        Raises:
            InputError: A tensor holds numbers that are NaN or infinite in this dtype.
        """
        flags = torch.stack(self._flags).tolist() if self._flags else []
        for (name, path), is_finite in zip(self._origins, flags, strict=True):
            if not is_finite:
                in_dtype = str(dtype).removeprefix("torch.")
                raise InputError(
                    f"Got {path}, where {name} has numbers that are NaN or infinite in {in_dtype}: the file "
                    "is damaged, fetch it again"
                )
