"""Files of a model in every form that is in use, written with the packages that write them elsewhere."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.model import Flux
from flux.modules.gguf_blocks import BLOCKS, HALVES
from flux.specs import configs
from flux.weights.open_model import LoraUse, ModelFiles, OpenModel
from helpers import tiny_models

KINDS = tuple(BLOCKS)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 23802932552\n"

# Wide enough for blocks of 256.
WIDE = replace(
    tiny_models.PARAMS,
    hidden_size=256,
    num_heads=2,
    axes_dim=[16, 56, 56],
    depth=1,
    depth_single_blocks=2,
    mlp_ratio=2.0,
)


def spec(params=tiny_models.PARAMS, **changes):
    """The spec of flux-dev in the sizes of tiny models."""
    return replace(configs["flux-dev"], params=params, ae_params=tiny_models.AE_PARAMS, **changes)


def wide(seed: int = 0) -> Flux:
    """A random model whose matrices are wide enough for GGUF's largest blocks."""
    return tiny_models.randomized(Flux(WIDE), seed)


def load(
    path: Path,
    params=tiny_models.PARAMS,
    dtype=torch.float32,
    keep_8bit=False,
    loras=(),
    own_lora=None,
    **changes,
) -> Flux:
    """The transformer of that file. Its own LoRA is a path and a strength."""
    own = LoraUse(*own_lora) if own_lora else None
    files = ModelFiles(path, path, path, loras=tuple(LoraUse(*lora) for lora in loras), own_lora=own)
    return OpenModel(spec(params, **changes), files).load_transformer("cpu", dtype, keep_8bit)


def velocity(model: Flux, **more) -> Tensor:
    """The answer to random inputs of two rows."""
    return model(**tiny_models.inputs(2, params=model.params), **more)


def same(model: Flux, expected: Flux) -> bool:
    """Whether both give the same velocity, bit for bit."""
    return torch.equal(velocity(model), velocity(expected))


def save(weights: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    """Writes a safetensors file, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.clone().contiguous() for name, x in weights.items()}, path, metadata or None)
    return path


def with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same weights under longer names."""
    return {prefix + name: x for name, x in weights.items()}


def random_blocks(rows: int, columns: int, kind: str, seed: int = 0) -> np.ndarray:
    """A packed matrix whose numbers are of order 1: any bytes are such a matrix if its scales are finite."""
    per_block, size = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // per_block, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(0, 0.001, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def packable(name: str, x: Tensor) -> bool:
    """The matrices that quantisers pack: those within the blocks."""
    return x.ndim == 2 and "block" in name and name.endswith(".weight")


def save_gguf(
    weights: dict[str, Tensor], path: Path, kind: str, architecture: str = "flux", pack=packable
) -> dict[str, Tensor]:
    """Writes a GGUF file and returns what it holds, by the decoder of the `gguf` package."""
    writer, held = gguf.GGUFWriter(path, architecture), {}
    for seed, (name, x) in enumerate(weights.items()):
        plain = x.float().numpy().copy()
        if not pack(name, x):
            writer.add_tensor(name, plain)
            held[name] = x.float()
            continue
        quantization = gguf.GGMLQuantizationType[kind]
        if kind.endswith("_K"):
            data = random_blocks(*x.shape, kind, seed)
        else:
            data = gguf.quantize(plain, quantization)
        held[name] = torch.from_numpy(gguf.dequantize(data, quantization).astype(np.float32).copy())
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def model_of(weights: dict[str, Tensor], params=tiny_models.PARAMS) -> Flux:
    """The model of these weights, by torch's own loading."""
    model = Flux(params)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def scaled_fp8(weights: dict[str, Tensor], ending: str = ".scale_weight", per_row: bool = False):
    """Matrices as 8-bit floats with scales; and what they stand for."""
    file, meant = {}, {}
    for name, x in weights.items():
        file[name] = meant[name] = x
        if x.ndim == 2:
            scale = (x.abs().amax(dim=1, keepdim=True) if per_row else x.abs().max()) / 448
            file[name] = (x / scale).to(torch.float8_e4m3fn)
            file[name.removesuffix(".weight") + ending] = scale
            meant[name] = file[name].float() * scale
    return file, meant
