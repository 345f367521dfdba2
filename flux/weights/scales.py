"""Quantised weights in checkpoints: which matrices have scales, and which formats are not supported.

Two dialects of scaled 8-bit floats are read. Beside a matrix `X.weight`,

* "scaled_fp8" has `X.scale_weight`, a marker tensor `scaled_fp8`, and `X.scale_input` for other programs;
* the newer one has `X.weight_scale`, and for other programs `X.input_scale` and a JSON text `X.comfy_quant`.

8-bit whole numbers are read too, if each has such a scale and the file declares no format for them: weight =
scale * q.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules import gguf_blocks
from flux.modules.float8 import EIGHT_BIT_FLOATS
from flux.weights.headers import StoredTensor, parse_json, short_name

FLOATS = ("F64", "F32", "F16", "BF16")
MARKER = "scaled_fp8"
SCALE_ENDINGS = (".scale_weight", ".weight_scale")  # the first one that a matrix has is used
EXTRAS = (".scale_input", ".input_scale", ".comfy_quant")  # for other programs, beside a matrix with a scale
INT8 = "I8"
WHOLE_NUMBERS = {INT8: "8-bit whole numbers", "U8": "packed bytes", "I32": "packed whole numbers"}
UNSUPPORTED_ENDINGS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (fp4)",
    ".wscales": "Nunchaku (SVDQuant) 4-bit",
    "._data": "quanto",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_scale_2": "nvfp4",
}


@dataclass(frozen=True)
class ScaledTensor:
    """A stored tensor and, for 8-bit numbers that have one, the scale to multiply it by."""

    stored: StoredTensor
    scale: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the expanded tensor."""
        return self.stored.shape

    @property
    def kind(self) -> str:
        """The stored number format, see `StoredTensor`."""
        return self.stored.kind

    def read(self, device: torch.device | str = "cpu", is_filled: bool = False) -> Tensor:
        """Read the tensor: packed or scaled kinds expanded to float32, others in their stored dtype.

        `is_filled` is that of `StoredTensor.read`.
        """
        if torch.device(device).type == "mps" and self.kind in EIGHT_BIT_FLOATS:  # MPS has no 8-bit floats
            return self.read("cpu", is_filled).float().to(device)
        raw = self.stored.read(device, is_filled)
        if self.kind in gguf_blocks.BLOCKS:
            return gguf_blocks.expand(raw, self.kind)
        scale = self.read_scale(device)
        if scale is None:
            return raw
        return raw.float() * (scale if scale.ndim == 0 else scale.view(-1, *[1] * (raw.ndim - 1)))

    def read_scale(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Read the scale in float32: one number, or one for each row, "rows 1". None if there is none."""
        if self.scale is None:
            return None
        scale = self.scale.read(device).float()
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)


def pair_with_scales(
    path: Path, stored: Mapping[str, StoredTensor], declared: Iterable[Mapping[str, Any]]
) -> dict[str, ScaledTensor]:
    """Join each matrix of 8-bit numbers with its scale; leave out what only other programs need.

    A scale that fits no matrix is kept under its own name. No model has such a tensor, so that loading
    fails: without its scale the matrix would only make noise.

    Args:
        path: The checkpoint, for messages.
        stored: The files' tensors by name.
        declared: The files' `_quantization_metadata`.

    Raises:
        InputError: The checkpoint uses a quantisation that is not supported.
    """
    scales = {name: scale for name in stored if (scale := _scale_of(name, stored)) is not None}
    _refuse_unsupported(path, stored, scales)
    _check_declared(path, declared)
    _check_comfy_quant(path, scales, stored)
    extras = {name.removesuffix(".weight") + ending for name in scales for ending in EXTRAS}
    # Those of "scaled_fp8" may stand without a matrix.
    extras |= {name for name in stored if name == MARKER or name.endswith((f".{MARKER}", ".scale_input"))}
    left_out = {*scales.values(), *extras}
    return {
        name: ScaledTensor(tensor, stored[scales[name]] if name in scales else None)
        for name, tensor in stored.items()
        if name not in left_out
    }


def _scale_of(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """The name of the scale of this tensor, if it is one of 8-bit numbers that has a fitting one."""
    if not name.endswith(".weight") or stored[name].kind not in (*EIGHT_BIT_FLOATS, INT8):
        return None
    stem, rows = name.removesuffix(".weight"), stored[name].shape[:1]
    scale = next((stem + ending for ending in SCALE_ENDINGS if stem + ending in stored), None)
    if scale is None or stored[scale].kind not in FLOATS:
        return None
    shape = stored[scale].shape
    return scale if math.prod(shape) == 1 or shape in (rows, (*rows, 1)) else None


# ---- formats that are not supported


def _refuse_unsupported(path: Path, stored: Mapping[str, StoredTensor], scaled: Container[str]) -> None:
    for name in stored:
        for ending, title in UNSUPPORTED_ENDINGS.items():
            if name.endswith(ending):
                raise InputError(f"Got {path}, which is {title}: not supported, take a GGUF or fp8 file")
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.kind in WHOLE_NUMBERS and name not in scaled:
            raise InputError(
                f"Got {path}, where {short_name(name)} is in {WHOLE_NUMBERS[tensor.kind]} without a scale "
                "for each row: not supported, take a GGUF or fp8 file"
            )


def _check_declared(path: Path, declared: Iterable[Mapping[str, Any]]) -> None:
    """Check the formats that a file's header declares for its layers."""
    for metadata in declared:
        layers = metadata.get("layers")
        if isinstance(layers, dict):
            for name, layer in layers.items():
                _check_format(path, name, layer)


def _check_comfy_quant(path: Path, scaled: Iterable[str], stored: Mapping[str, StoredTensor]) -> None:
    """Check the format that a JSON text declares for each matrix that has a scale."""
    for name in scaled:
        stem = name.removesuffix(".weight")
        text = stored.get(stem + ".comfy_quant")
        if text is not None:
            is_text = text.kind == "U8" and text.size < 10_000
            _check_format(path, stem, parse_json(text.read().numpy().tobytes() if is_text else b"", path))


def _check_format(path: Path, name: str, layer: object) -> None:
    declared = layer.get("format") if isinstance(layer, dict) else None
    if declared not in ("float8_e4m3fn", "float8_e5m2"):
        what = f"{short_name(name)} is quantised as {str(declared)[:40]!r}"
        raise InputError(f"Got {path}, where {what}: not supported, take a GGUF or fp8 file")
