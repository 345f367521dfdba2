"""The two kinds of transformer block of FLUX.1 and the parts they are made of.

Shapes: B batch, T text tokens, I tokens of the image stream (with those of context images, which come last),
N = T + I, H heads, D head size, C = H D channels, M hidden channels of the MLP. Attribute names are keys of
the published checkpoints and stay as they are.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.math import PLAIN, AttentionEdit, KeysValues, QueriesKeysValues, attend, join_streams, rope
from flux.modules.linear import AnyLinear, can_project_rows, project_rows
from flux.modules.norms import ModulationOut, QKNorm, layer_norm, split_modulation
from flux.modules.norms import RMSNorm as RMSNorm  # upstream's import path
from flux.modules.ops import Rounded
from flux.modules.projections import feed_forward, gelu_linear, kv_heads, modulate, q_heads, qkv_heads


class EmbedND(nn.Module):
    """Rotary embedding over several axes, each with its own share of a head's channels."""

    def __init__(self, dim: int, theta: int, axes_dim: list[int]):
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Positions "B N axes" -> rotations "B 1 N D/2 2 2"."""
        per_axis = [rope(ids[..., axis], dim, self.theta) for axis, dim in enumerate(self.axes_dim)]
        return torch.cat(per_axis, dim=-3).unsqueeze(1)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000, time_factor: float = 1000.0) -> Tensor:
    """Cosines, then sines, of `time_factor * t` at `dim // 2` frequencies from 1 down to 1 / max_period.

    Args:
        t: Noise levels 0..1 or guidance scales, "B".
        dim: Number of channels of the embedding.
        max_period: Period of the lowest frequency, divided by 2 pi.
        time_factor: Factor of `t`.

    Returns:
        "B dim", in the dtype of `t` if that is a floating-point one.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32) / half
    frequency = torch.exp(-math.log(max_period) * exponent).to(t.device)
    angle = (time_factor * t).float()[:, None] * frequency
    embedding = F.pad(torch.cat((angle.cos(), angle.sin()), dim=-1), (0, dim % 2))
    return embedding.to(t.dtype) if t.is_floating_point() else embedding


class MLPEmbedder(nn.Module):
    """Two linear layers with a SiLU between, from an embedding to the model's width."""

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed: "B in_dim" -> "B hidden_dim"."""
        return self.out_layer(self.silu(self.in_layer(x)))


class SelfAttention(nn.Module):
    """The projections of one stream into and out of attention.

    In the model, the attention itself spans both streams: see `DoubleStreamBlock.joint_attention`.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv: AnyLinear = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj: AnyLinear = nn.Linear(dim, dim)
        self.norm = QKNorm(dim // num_heads)

    def forward(self, x: Tensor, pe: Tensor) -> Tensor:
        """Attention of the stream to itself alone: "B N C" -> "B N C"."""
        return self.proj(attend(*self.heads(x, pe)))

    def heads(self, x: Tensor | Rounded, pe: Tensor) -> QueriesKeysValues:
        """Normalised and rotated queries and keys, and values: "B N C" -> three times "B H N D"."""
        return qkv_heads(self.qkv(x), self.norm, pe, self.num_heads)

    def lazy_heads(
        self, x: Tensor | Rounded, pe: Tensor, split: bool
    ) -> tuple[Callable[[], Tensor], Callable[[], KeysValues]]:
        """Functions that return the queries, and the keys and values, of `heads`.

        With `split`, each of them projects its own part when it is called.
        """
        if split and can_project_rows(self.qkv):
            args = self.qkv, self.norm, x, pe, self.num_heads
            return partial(q_heads, *args), partial(kv_heads, *args)
        q, k, v = self.heads(x, pe)
        return lambda: q, lambda: (k, v)


class Modulation(nn.Module):
    """One or two `ModulationOut` from the conditioning vector (adaLN-zero, arXiv 2212.09748, section 3.2)."""

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.num_branches = 2 if double else 1
        self.lin = nn.Linear(dim, 3 * self.num_branches * dim)

    def project(self, vec: Tensor) -> Tensor:
        """The modulations of all branches side by side: "B C" -> "B branches*3C"."""
        return self.lin(F.silu(vec))

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        """The modulations of the first branch, and of the second if there is one."""
        first, *second = split_modulation(self.project(vec), self.num_branches)
        return first, second[0] if second else None


class Block(nn.Module):
    """A transformer block. The model calls its `run`; `forward` is upstream's call."""

    run: Callable

    def compile(self, **options) -> None:
        """Compile `run`, with the options of torch.compile."""
        self.run = torch.compile(self.run, **options)

    def __getstate__(self) -> dict:
        # A copy gets its own `run`: the compiled one belongs to this block.
        return {name: value for name, value in super().__getstate__().items() if name != "run"}


class DoubleStreamBlock(Block):
    """Image and text in streams of their own that meet in one attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False):
        super().__init__()
        self.num_heads, self.hidden_size = num_heads, hidden_size
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)

        self.img_mod = Modulation(hidden_size, double=True)
        self.img_norm1 = layer_norm(hidden_size)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_norm2 = layer_norm(hidden_size)
        self.img_mlp = _mlp(hidden_size, self.mlp_hidden_dim)

        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_norm1 = layer_norm(hidden_size)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_norm2 = layer_norm(hidden_size)
        self.txt_mlp = _mlp(hidden_size, self.mlp_hidden_dim)

    def modulate(self, vec: Tensor) -> Tensor:
        """The modulations that `run` takes, the image's first: "B C" -> "B 12C"."""
        return torch.cat((self.img_mod.project(vec), self.txt_mod.project(vec)), dim=-1)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams one layer on, as upstream calls it: `run` with the modulations of `vec`, "B C"."""
        img, txt, _ = self.run(img, txt, self.modulate(vec), pe)
        return img, txt

    def run(
        self, img: Tensor, txt: Tensor, mods: Tensor, pe: Tensor, edit: AttentionEdit = PLAIN
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """Both streams one layer on, and the queries, keys and values if `edit` records them.

        Args:
            img: Image stream, "B I C".
            txt: Text stream, "B T C".
            mods: What `modulate` returns, "B 12C" or "1 12C".
            pe: Rotations, text first, "B 1 N D/2 2 2".
            edit: What changes in the attention.
        """
        img_mod1, img_mod2, txt_mod1, txt_mod2 = split_modulation(mods, 4)
        img_in = modulate(self.img_norm1, img, img_mod1, self.img_attn.qkv)
        txt_in = modulate(self.txt_norm1, txt, txt_mod1, self.txt_attn.qkv)
        img_attn, txt_attn, qkv = self.joint_attention(img_in, txt_in, pe, edit)

        # addcmul(x, gate, y) is x + gate * y.
        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_attn))
        img_in = modulate(self.img_norm2, img, img_mod2, self.img_mlp[0])
        img = torch.addcmul(img, img_mod2.gate, feed_forward(self.img_mlp, img_in))

        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn))
        txt_in = modulate(self.txt_norm2, txt, txt_mod2, self.txt_mlp[0])
        txt = torch.addcmul(txt, txt_mod2.gate, feed_forward(self.txt_mlp, txt_in))
        return img, txt, qkv

    def joint_attention(
        self, img: Tensor | Rounded, txt: Tensor | Rounded, pe: Tensor, edit: AttentionEdit
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """Attention of both streams to both: "B I C" and "B T C", and what `edit` records."""
        num_txt = txt.shape[1]
        # Project, normalise and rotate. The image's own keys and values may not be needed.
        txt_q, txt_k, txt_v = self.txt_attn.heads(txt, pe[:, :, :num_txt])
        project_q, project_kv = self.img_attn.lazy_heads(img, pe[:, :, num_txt:], edit.splits_qkv)
        # Inject keys and values of another pass (Stable Flow, section 3.2), wholly or with a weight.
        img_k, img_v = edit.whole_kv or edit.inject(*project_kv())
        k, v = join_streams(txt_k, img_k), join_streams(txt_v, img_v)
        # If processes share the tokens, all keys and values arrive while the queries are projected.
        wait = edit.gather(k, v)
        q = join_streams(txt_q, edit.inject_queries(project_q()))
        attn = edit.attend(q, *wait())
        return attn[:, num_txt:], attn[:, :num_txt], (q, k, v) if edit.record else None


class SingleStreamBlock(Block):
    """Text and image as one sequence; attention and MLP side by side, as in arXiv 2302.05442."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_scale: float | None = None,  # noqa: ARG002  (upstream's)
    ):
        super().__init__()
        self.num_heads, self.hidden_dim = num_heads, hidden_size
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)
        # One projection to queries, keys, values and hidden channels, one back from attention and MLP.
        self.linear1: AnyLinear = nn.Linear(hidden_size, hidden_size * 3 + self.mlp_hidden_dim)
        self.linear2: AnyLinear = nn.Linear(hidden_size + self.mlp_hidden_dim, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = layer_norm(hidden_size)
        self.modulation = Modulation(hidden_size, double=False)

    def modulate(self, vec: Tensor) -> Tensor:
        """The modulations that `run` takes: "B C" -> "B 3C"."""
        return self.modulation.project(vec)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """The sequence one layer on, as upstream calls it: `run` with the modulations of `vec`, "B C"."""
        return self.run(x, self.modulate(vec), pe)[0]

    def run(
        self, x: Tensor, mods: Tensor, pe: Tensor, num_txt: int = 0, edit: AttentionEdit = PLAIN
    ) -> tuple[Tensor, QueriesKeysValues | None]:
        """The sequence one layer on, and the queries, keys and values if `edit` records them.

        Args:
            x: Text and image tokens, "B N C".
            mods: What `modulate` returns, "B 3C" or "1 3C".
            pe: Rotations, "B 1 N D/2 2 2".
            num_txt: Number of text tokens, T. Needed only if `edit` injects.
            edit: What changes in the attention.
        """
        (mod,) = split_modulation(mods, 1)
        x_in = modulate(self.pre_norm, x, mod, self.linear1)
        q, k, v, project_hidden = self.project(x_in, pe, num_txt, edit)

        # Inject image keys and values of another pass (Stable Flow, section 3.2), wholly or with a weight.
        if edit.changes_kv:
            img_k, img_v = edit.inject(k[:, :, num_txt:], v[:, :, num_txt:])
            k, v = join_streams(k[:, :, :num_txt], img_k), join_streams(v[:, :, :num_txt], img_v)

        if edit.queries is not None:
            q = join_streams(q[:, :, :num_txt], edit.inject_queries(q[:, :, num_txt:]))

        # If processes share the tokens, all keys and values arrive while the hidden channels are projected.
        wait = edit.gather(k, v)
        hidden = project_hidden()
        attn = edit.attend(q, *wait())
        # addcmul(x, gate, y) is x + gate * y.
        x = torch.addcmul(x, mod.gate, gelu_linear(self.linear2, hidden, attn))
        return x, (q, k, v) if edit.record else None

    def project(
        self, x: Tensor | Rounded, pe: Tensor, num_txt: int, edit: AttentionEdit
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]:
        """Queries, keys, values, and a function that returns the MLP's hidden channels, "B N M".

        All come from one matmul, unless `edit` needs no image keys and values, which are then left out, or
        needs them early.
        """
        qkv_width = 3 * self.hidden_dim
        if not (edit.splits_qkv and can_project_rows(self.linear1)):
            qkv, hidden = self.linear1(x).split((qkv_width, self.mlp_hidden_dim), dim=-1)
            return *qkv_heads(qkv, self.norm, pe, self.num_heads), lambda: hidden
        if edit.whole_kv:
            q = q_heads(self.linear1, self.norm, x, pe, self.num_heads)
            txt, txt_pe = x[:, :num_txt], pe[:, :, :num_txt]
            k, v = kv_heads(self.linear1, self.norm, txt, txt_pe, self.num_heads)
        else:
            qkv = project_rows(self.linear1, x, 0, qkv_width)
            q, k, v = qkv_heads(qkv, self.norm, pe, self.num_heads)
        return q, k, v, partial(project_rows, self.linear1, x, qkv_width)


class LastLayer(nn.Module):
    """From the model's width back to packed latent channels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulate(self, vec: Tensor) -> Tensor:
        """The shift and scale that `forward` takes: "B C" -> "B 2C"."""
        return self.adaLN_modulation(vec)

    def forward(self, x: Tensor, vec: Tensor | None = None, mod: Tensor | None = None) -> Tensor:
        """Project "B I C" to "B I channels".

        Args:
            x: Image stream, "B I C".
            vec: Conditioning vector, "B C". Not needed if `mod` is given.
            mod: What `modulate` returns, "B 2C" or "1 2C".

        Raises:
            ValueError: Both are None.
        """
        if mod is None:
            if vec is None:
                raise ValueError("Got neither vec nor its modulations: give one of them")
            mod = self.modulate(vec)
        shift, scale = mod.unsqueeze(1).chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
