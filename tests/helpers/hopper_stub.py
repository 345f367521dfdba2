"""Stand-ins for quack-kernels and flash-attn-4 in plain PyTorch.

An epilogue is a function; here it is called with whole tensors. Arguments that the real kernels refuse are
refused.
"""

import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor

import flux.modules


class Op:
    def __init__(self, name: str, eps: float = 0.0):
        self.name, self.eps = name, eps


class Row(Op):
    """A number for each output channel, "L n"."""

    def laid_out(self, value: Tensor, acc: Tensor) -> Tensor:
        assert value.shape == (acc.shape[0], acc.shape[2])
        assert value.stride(-1) == 1
        return value[:, None].float()


class Column(Op):
    """A number for each token, "L m"."""

    def laid_out(self, value: Tensor, acc: Tensor) -> Tensor:
        assert value.shape == acc.shape[:2]
        return value[:, :, None].float()


class Rotary(Op):
    """Cosines and sines, interleaved, "m D", one table for the whole batch."""

    def laid_out(self, value: Tensor, acc: Tensor) -> Tensor:
        assert value.shape[0] == acc.shape[1]
        assert value.is_contiguous()
        return value.float().repeat(1, acc.shape[2] // value.shape[1])[None]


class HeadRstd(Op):
    """1 over the root mean square of each head, of the given size."""

    def finished(self, squares: Tensor, size: int) -> Tensor:
        heads = squares.unflatten(-1, (-1, size)).mean(-1, keepdim=True)
        return (heads + self.eps).rsqrt().expand(*heads.shape[:-1], size).flatten(-2)


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def pack(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2)


class Epilogue:
    def __init__(self, function, ops: dict[str, Op], prepass=None, prepass_outs=(), mode: str = "element"):
        assert (mode == "acc_pair") == ("rotations" in ops)
        self.function, self.ops, self.prepass, self.outs = function, ops, prepass, prepass_outs
        self.semantic_digest = function.__name__

    def gemm(self, left, right, out, stream=None, *, epi_args, post_init_attrs=(), **tiles) -> "Epilogue":
        most = {64: 256, 128: 208, 192: 128} if tiles["pingpong"] else {192: 256}
        assert tiles["tile_N"] % 16 == 0
        assert tiles["tile_N"] <= most[tiles["tile_M"]]
        assert tiles["tile_N"] % 128 == 0 or not self.prepass
        run_gemm_epi_plan(self, left, right, out, stream, epi_args)
        return self

    def run(self, left, right, out, stream, epi_args: dict) -> None:
        assert left.stride(-1) == right.stride(-1) == out.stride(-1) == 1
        assert left.dtype == right.dtype
        acc = left.float() @ right.float().transpose(1, 2)
        assert epi_args.keys() == self.ops.keys()
        given = {} if stream is None else {"c": stream.float()}
        statistics = [name for name, op in self.ops.items() if isinstance(op, HeadRstd)]
        for name in self.ops.keys() - set(statistics):
            given[name] = self.ops[name].laid_out(epi_args[name], acc)
        assert statistics == list(self.outs)
        for name in statistics:
            wanted = {"bias", "token_scale", "channel_scale"} & given.keys()
            squares = self.prepass(acc, **{key: given[key] for key in wanted})[name]
            given[name] = self.ops[name].finished(squares, epi_args[name])
        out.copy_(self.function(acc, **given)["D"])


def run_gemm_epi_plan(plan: Epilogue, left, right, out, stream, epi_args: dict) -> None:
    plan.run(left, right, out, stream, epi_args)


def gemm_epilogue(**options):
    return lambda function: Epilogue(function, **options)


def _flash_attn_fwd(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return (mixed if out is None else out.copy_(mixed), None)


MODULES = {
    "quack": {},
    "quack.activation": {"gelu_tanh_approx": lambda x: F.gelu(x, approximate="tanh")},
    "quack.epilogue": {},
    "quack.epilogue.frontend": {"gemm_epilogue": gemm_epilogue, "pack": pack, "unpack": unpack},
    "quack.epilogue.head_rmsnorm": {"HeadRstd": HeadRstd},
    "quack.epilogue.ops": {"ColVecLoad": Column, "RowVecLoad": Row},
    "quack.epilogue.rotary": {"rotary_cos_sin_load": Rotary},
    "quack.gemm_runtime": {},
    "quack.gemm_runtime.host": {"run_gemm_epi_plan": run_gemm_epi_plan},
    "flash_attn": {},
    "flash_attn.cute": {},
    "flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd},
}


def install(patch) -> None:
    """Put these in place of the packages, for as long as the patch lasts."""
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
    gpu = types.SimpleNamespace(multi_processor_count=132)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    forget()


def forget() -> None:
    """Have the modules that were imported with these imported anew."""
    for name in ("matmul_hopper", "projections_hopper"):
        sys.modules.pop(f"flux.modules.{name}", None)
        vars(flux.modules).pop(name, None)
