"""Blocks for Hopper GPUs: matmuls with the operation after them in one kernel, and attention by flash-attn-4.

Results stay in float32 until they are written and are rounded once, where `flux.modules.layers` rounds in
between. There are no gradients. Each row of a batch comes out as it would alone.
"""

# The package is installed on Hopper GPUs only.
# pyright: reportMissingImports=false

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux.math import PLAIN as PLAIN_EDIT
from flux.math import AttentionEdit, KeysValues, QueriesKeysValues
from flux.modules.layers import DoubleStreamBlock, Modulation, SelfAttention, SingleStreamBlock
from flux.modules.linear import Fp8Linear
from flux.modules.matmul_hopper import GATED, GELU, HEAD_SIZES, HEADS, PLAIN, cached_by_tensor
from flux.modules.norms import QKNorm, RMSNorm, split_modulation
from flux.modules.ops import Rounded, copy_tokens, has_kernel
from flux.modules.projections import modulate, split_heads

# Before the import, which reads it.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# flash-attn-4 warns about its own arguments when it compiles its kernel.
warnings.filterwarnings("ignore", ".* cannot be converted to a JitArgument", UserWarning)

from flash_attn.cute.interface import _flash_attn_fwd  # noqa: E402  (see above)


@cached_by_tensor
def _table(pe: Tensor) -> Tensor:
    """Cosines and sines, interleaved: rotations "B 1 N D/2 2 2" -> "B N D". Made once for all layers."""
    return pe[:, 0, :, :, :, 0].flatten(2).contiguous()  # the first column of each pair's matrix


@dataclass(eq=False)
class Heads:
    """Projects tokens to queries, keys and values, straight into their places.

    Attributes:
        linear: Its output channels begin with those of queries, keys and values.
        norm: Normalises queries and keys.
        num_heads: Number of heads.
        x: Input, "B n C".
        table: Rotations, from `_table`, "B n D" or "1 n D".
        qk: Where queries and keys go, "B n 2C".
        v: Where values go, "B n C".
    """

    linear: nn.Module
    norm: QKNorm
    num_heads: int
    x: Tensor | Rounded
    table: Tensor
    qk: Tensor
    v: Tensor

    def project_q(self) -> None:
        """Write the queries alone, normalised and rotated."""
        self._project(0, 1, self.norm.query_norm)

    def project_k(self) -> None:
        """Write the keys alone, normalised and rotated."""
        self._project(1, 2, self.norm.key_norm)

    def project_qk(self) -> None:
        """Write queries and keys, normalised and rotated."""
        self._project(0, 2, self.norm.query_norm, self.norm.key_norm)

    def project_v(self) -> None:
        """Write the values."""
        width = self.x.shape[-1]
        PLAIN(self.linear, self.x, 2 * width, 3 * width, self.v)

    def _project(self, start: int, stop: int, *norms: RMSNorm) -> None:
        """Write the channels from start * C to stop * C."""
        start, stop = start * self.x.shape[-1], stop * self.x.shape[-1]
        scale = torch.cat([norm.scale.expand(self.num_heads, -1) for norm in norms]).flatten()
        vectors = {"rstd": self.table.shape[-1], "scale": scale.expand(len(self.qk), -1)}
        out = self.qk[..., start:stop]
        if len(self.table) == 1:
            HEADS(self.linear, self.x, start, stop, out, rotations=self.table[0], **vectors)
            return
        # A kernel has one table of rotations for all rows.
        vectors["scale"] = scale[None]
        for row in range(len(self.table)):
            one = slice(row, row + 1)
            HEADS(self.linear, self.x[one], start, stop, out[one], rotations=self.table[row], **vectors)


def _places(x: Tensor | Rounded, tokens: int) -> tuple[Tensor, Tensor]:
    """Uninitialised places for queries with keys, "B n 2C", and for values, "B n C"."""
    batch, _, width = x.shape
    return x.new_empty(batch, tokens, 2 * width), x.new_empty(batch, tokens, width)


def _split(qk: Tensor, v: Tensor, num_heads: int) -> QueriesKeysValues:
    """Queries, keys and values, "B H N D" each: views of their places."""
    q, k = (split_heads(part, num_heads) for part in qk.chunk(2, dim=-1))
    return q, k, split_heads(v, num_heads)


def _inject(edit: AttentionEdit, k: Tensor, v: Tensor) -> None:
    """`AttentionEdit.inject` in place, "B H I+J D" each."""
    num_img = k.shape[2] - edit.num_context
    if edit.num_context and edit.context_kv is not None:
        for whole, injected in zip((k, v), edit.context_kv):
            whole[:, :, num_img:].copy_(injected)
    elif edit.context_strength is not None:
        context = k[:, :, num_img:]
        context.copy_(edit.scale_context(context, edit.context_strength))
    for whole, injected in zip((k, v), edit.kv or ()):
        own = whole[:, :, :num_img]
        if injected is not None and edit.kv_weight is None:
            own.copy_(injected)
        elif injected is not None and edit.kv_weight is not None:
            own.lerp_(injected, edit.kv_weight)


def _inject_queries(edit: AttentionEdit, q: Tensor) -> None:
    """`AttentionEdit.inject_queries` in place, "B H I+J D"."""
    if edit.queries is not None:
        own = q[:, :, : q.shape[2] - edit.num_context]
        own.copy_(edit.queries if edit.kv_weight is None else torch.lerp(own, edit.queries, edit.kv_weight))


def _num_others(edit: AttentionEdit) -> int:
    """The number of other tokens that `_gather` writes behind the pass's own."""
    if edit.other_places is None or edit.exchange is not None or edit.context_kv is not None:
        return 0
    return len(edit.other_places)


def _gather(edit: AttentionEdit, qk: Tensor, v: Tensor, num_heads: int) -> Callable[[], KeysValues]:
    """`AttentionEdit.gather`, with the others written behind the pass's own, instead of both copied.

    Args:
        edit: The edit.
        qk: Queries and keys of the pass's own tokens, then places for `_num_others` more, "B n 2C".
        v: Values, likewise, "B n C".
        num_heads: Number of heads, H.
    """
    _, keys, values = _split(qk, v, num_heads)
    others, width = _num_others(edit), v.shape[-1]
    if not others or edit.others is None or edit.other_places is None:
        return edit.gather(keys, values)
    own = v.shape[1] - others
    for other, place in zip(edit.others, (qk[:, own:, width:], v[:, own:])):
        copy_tokens(other.transpose(1, 2).flatten(2), edit.other_places, place)
    return lambda: (keys, values)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax attention by flash-attn-4: three times "B H N D" -> "B N C", in `out` if that is given."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    place = None if out is None else out.unflatten(-1, q.shape[2:])
    attn = _flash_attn_fwd(q, k, v, out=place)[0]
    return attn.flatten(2) if out is None else out


def _hidden(linear: nn.Module, x: Tensor | Rounded, width: int, start: int = 0, free: int = 0) -> Tensor:
    """The GELU of the MLP's hidden channels, "B N M".

    Args:
        linear: Projects to the hidden channels, with its output channels from `start` on.
        x: Input, "B N C".
        width: Number of hidden channels, M.
        start: First of the output channels.
        free: Number of uninitialised channels to put before them, for attention's result.
    """
    wide = x.new_empty(*x.shape[:2], free + width)
    GELU(linear, x, start, None, wide[..., free:])
    return wide


def _add_gated(stream: Tensor, gate: Tensor, linear: nn.Module, x: Tensor | Rounded) -> Tensor:
    """The sum stream + gate * linear(x), "B N C"."""
    gate = gate[:, 0].expand(stream.shape[0], -1)
    return GATED(linear, x, stream=stream.contiguous(), gate=gate)


class HopperDoubleBlock(DoubleStreamBlock):
    """A double-stream block with fused kernels. On a CPU, or with gradients, it is a plain one."""

    def run(
        self, img: Tensor, txt: Tensor, mods: Tensor, pe: Tensor, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """See `DoubleStreamBlock.run`."""
        if not has_kernel(img):
            return super().run(img, txt, mods, pe, edit)
        img_mod1, img_mod2, txt_mod1, txt_mod2 = split_modulation(mods, 4)
        img_in = modulate(self.img_norm1, img, img_mod1, self.img_attn.qkv)
        txt_in = modulate(self.txt_norm1, txt, txt_mod1, self.txt_attn.qkv)
        img_attn, txt_attn, qkv = self.fused_attention(img_in, txt_in, pe, edit)

        img = _add_gated(img, img_mod1.gate, self.img_attn.proj, img_attn)
        img_in = modulate(self.img_norm2, img, img_mod2, self.img_mlp[0])
        hidden = _hidden(self.img_mlp[0], img_in, self.mlp_hidden_dim)
        img = _add_gated(img, img_mod2.gate, self.img_mlp[2], hidden)

        txt = _add_gated(txt, txt_mod1.gate, self.txt_attn.proj, txt_attn)
        txt_in = modulate(self.txt_norm2, txt, txt_mod2, self.txt_mlp[0])
        hidden = _hidden(self.txt_mlp[0], txt_in, self.mlp_hidden_dim)
        txt = _add_gated(txt, txt_mod2.gate, self.txt_mlp[2], hidden)
        return img, txt, qkv

    def fused_attention(
        self, img: Tensor | Rounded, txt: Tensor | Rounded, pe: Tensor, edit: AttentionEdit
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """See `DoubleStreamBlock.joint_attention`. Both streams are projected into the same tensors."""
        num_txt, own, table = txt.shape[1], txt.shape[1] + img.shape[1], _table(pe)
        qk, v = _places(img, own + _num_others(edit))
        q, k, values = _split(qk[:, :own], v[:, :own], self.num_heads)

        def heads(attn: SelfAttention, x: Tensor | Rounded, tokens: slice) -> Heads:
            places = table[:, tokens], qk[:, tokens], v[:, tokens]
            return Heads(attn.qkv, attn.norm, self.num_heads, x, *places)

        txt_heads = heads(self.txt_attn, txt, slice(num_txt))
        img_heads = heads(self.img_attn, img, slice(num_txt, own))
        txt_heads.project_qk()
        txt_heads.project_v()
        if not edit.splits_qkv:
            img_heads.project_qk()
        elif not edit.whole_kv:
            img_heads.project_k()
        if not edit.whole_kv:
            img_heads.project_v()
        _inject(edit, k[:, :, num_txt:], values[:, :, num_txt:])

        wait = _gather(edit, qk, v, self.num_heads)
        if edit.splits_qkv:
            img_heads.project_q()
        _inject_queries(edit, q[:, :, num_txt:])
        attn = edit.attend(q, *wait(), attend)
        return attn[:, num_txt:], attn[:, :num_txt], (q, k, values) if edit.record else None


class HopperSingleBlock(SingleStreamBlock):
    """A single-stream block with fused kernels. On a CPU, or with gradients, it is a plain one."""

    def run(
        self, x: Tensor, mods: Tensor, pe: Tensor, num_txt: int = 0, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, QueriesKeysValues | None]:
        """See `SingleStreamBlock.run`."""
        if not has_kernel(x):
            return super().run(x, mods, pe, num_txt, edit)
        (mod,) = split_modulation(mods, 1)
        x_in = modulate(self.pre_norm, x, mod, self.linear1)
        own = x.shape[1]
        qk, v = _places(x, own + _num_others(edit))
        q, k, values = self.fused_heads(x_in, pe, num_txt, edit, qk[:, :own], v[:, :own])

        wait = _gather(edit, qk, v, self.num_heads)
        hidden = _hidden(self.linear1, x_in, self.mlp_hidden_dim, 3 * self.hidden_dim, free=self.hidden_dim)
        place = hidden[..., : self.hidden_dim]
        if edit.hides_context:
            place.copy_(edit.attend(q, *wait(), attend))
        else:
            attend(q, *wait(), place)
        x = _add_gated(x, mod.gate, self.linear2, hidden)
        return x, (q, k, values) if edit.record else None

    def fused_heads(
        self, x: Tensor | Rounded, pe: Tensor, num_txt: int, edit: AttentionEdit, qk: Tensor, v: Tensor
    ) -> QueriesKeysValues:
        """Queries, keys and values, written to `qk` and `v`, with those of `edit` injected."""
        table = _table(pe)
        whole = Heads(self.linear1, self.norm, self.num_heads, x, table, qk, v)
        if edit.whole_kv:
            txt = x[:, :num_txt], table[:, :num_txt], qk[:, :num_txt], v[:, :num_txt]
            txt_heads = Heads(self.linear1, self.norm, self.num_heads, *txt)
            whole.project_q()
            txt_heads.project_k()
            txt_heads.project_v()
        else:
            whole.project_qk()
            whole.project_v()
        q, k, values = _split(qk, v, self.num_heads)
        _inject(edit, k[:, :, num_txt:], values[:, :, num_txt:])
        _inject_queries(edit, q[:, :, num_txt:])
        return q, k, values


def use_hopper(block: DoubleStreamBlock | SingleStreamBlock) -> None:
    """Turn a block into one with fused kernels, in place: the same weights, another `run`."""
    if isinstance(block, DoubleStreamBlock):
        block.__class__ = HopperDoubleBlock
    else:
        block.__class__ = HopperSingleBlock


def serves(block: nn.Module) -> bool:
    """Whether the kernels serve a block: linear layers in bfloat16 or 8-bit floats, heads of known sizes."""
    parts = [x for part in block.children() if not isinstance(part, Modulation) for x in part.modules()]
    return all(
        isinstance(part, Fp8Linear)
        or (isinstance(part, RMSNorm) and len(part.scale) in HEAD_SIZES)
        or (type(part) is nn.Linear and part.weight.dtype == torch.bfloat16 and part.bias is not None)
        for part in parts
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    )
