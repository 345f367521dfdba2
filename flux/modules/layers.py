"""The two kinds of transformer block of FLUX.1 and the parts they are made of.

Shapes: B batch, T text tokens, I image tokens, N = T + I, H heads, D head size, C = H D channels. Attribute
    names are keys of the published checkpoints and stay as they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.math import Exchange, KeysValues, attend, one_sequence, rope
from flux.modules.linear import in_parts
from flux.modules.norms import ModulationOut, QKNorm, layer_norm
from flux.modules.norms import RMSNorm as RMSNorm  # upstream's import path
from flux.modules.ops import has_kernel, modulated
from flux.modules.projections import Apart, begun, blend, replaces


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
        t: noise levels 0..1 or guidance scales, "B".

    Returns:
        "B dim", in the dtype of `t` if that is a floating one.
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
        return self.out_layer(self.silu(self.in_layer(x)))


class SelfAttention(nn.Module):
    """The projections of one stream into and out of attention. The attention itself spans both streams (the
    block's).
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.norm = QKNorm(dim // num_heads)

    def forward(self, x: Tensor, pe: Tensor) -> Tensor:
        """Attention of the stream to itself alone: "B N C" -> "B N C"."""
        return self.proj(attend(*Apart.heads(self.qkv, self.norm, x, pe, self.num_heads)))


class Modulation(nn.Module):
    """One or two `ModulationOut` from the conditioning vector (adaLN-zero, arXiv 2212.09748, section 3.2)."""

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.num_parts = 6 if double else 3
        self.lin = nn.Linear(dim, self.num_parts * dim)

    def project(self, vec: Tensor) -> Tensor:
        """All parts behind one another, "B parts*C"."""
        return self.lin(F.silu(vec))

    def split(self, parts: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        each = parts.unsqueeze(1).chunk(self.num_parts, dim=-1)
        return ModulationOut(*each[:3]), ModulationOut(*each[3:]) if self.num_parts == 6 else None

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        return self.split(self.project(vec))


class Block(nn.Module):
    """What both kinds have in common.

    Attributes:
        products: how its products are made on a card, `Apart` or `flux.modules.projections_hopper.Joined`.
    """

    products: type[Apart] = Apart

    def products_for(self, x: Tensor) -> type[Apart]:
        return self.products if has_kernel(x) else Apart


class DoubleStreamBlock(Block):
    """Image and text in streams of their own that meet in one attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False):
        super().__init__()
        mlp_hidden_dim = int(hidden_size * mlp_ratio)
        self.num_heads, self.hidden_size = num_heads, hidden_size
        for stream in ("img", "txt"):
            expand, contract = nn.Linear(hidden_size, mlp_hidden_dim), nn.Linear(mlp_hidden_dim, hidden_size)
            parts = {
                "mod": Modulation(hidden_size, double=True),
                "norm1": layer_norm(hidden_size),
                "attn": SelfAttention(hidden_size, num_heads, qkv_bias),
                "norm2": layer_norm(hidden_size),
                "mlp": nn.Sequential(expand, nn.GELU(approximate="tanh"), contract),
            }
            for name, part in parts.items():
                self.add_module(f"{stream}_{name}", part)

    def modulate(self, vec: Tensor) -> Tensor:
        """What `forward` takes for `mod`: the image's modulation, then the text's, "B 12C"."""
        return torch.cat((self.img_mod.project(vec), self.txt_mod.project(vec)), dim=-1)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        given: KeysValues | None = None,
        keep: bool = False,
        weight: Tensor | None = None,
        mod: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, ...]:
        """Both streams one layer on: img "B I C", txt "B T C", vec "B C", pe "B 1 N D/2 2 2" (text first).

        Args:
            given: the image stream attends to these image keys and values instead of its own.
            keep: return queries, keys and values of all tokens, as they were used, as a third value.
            weight: how far the given ones replace its own, in a shape that fits "B H I D"; None: wholly.
            mod: what `modulate` made of `vec`, of each row or one for all; None: it is made here.
            exchange: for tokens that are a share of all, see `flux.runtime.parallel`.
        """
        num_txt, products = txt.shape[1], self.products_for(img)
        img_mod, txt_mod = (self.modulate(vec) if mod is None else mod).chunk(2, dim=-1)
        img_mod1, img_mod2 = self.img_mod.split(img_mod)
        txt_mod1, txt_mod2 = self.txt_mod.split(txt_mod)

        img_in = modulated(self.img_norm1, img, img_mod1, self.img_attn.qkv)
        txt_in = modulated(self.txt_norm1, txt, txt_mod1, self.txt_attn.qkv)
        own = self.txt_attn, txt_in, self.img_attn, img_in, pe
        q, k, v, whole = products.heads_of_both(*own, given, weight, exchange)
        mixed = products.attend(q, *whole())
        txt_mixed, img_mixed = mixed[:, :num_txt], mixed[:, num_txt:]

        img = products.added(img, img_mod1.gate, self.img_attn.proj, img_mixed)
        img = self._feed_forward("img", img, img_mod2, products)
        txt = products.added(txt, txt_mod1.gate, self.txt_attn.proj, txt_mixed)
        txt = self._feed_forward("txt", txt, txt_mod2, products)
        return (img, txt, (q, k, v)) if keep else (img, txt)

    def _feed_forward(self, stream: str, x: Tensor, mod: ModulationOut, products: type[Apart]) -> Tensor:
        """One stream, "B N C", and on it what its MLP makes of it."""
        expand, _, contract = getattr(self, f"{stream}_mlp")
        x_in = modulated(getattr(self, f"{stream}_norm2"), x, mod, expand)
        return products.contracted(x, mod.gate, contract, products.hidden(expand, x_in))


class SingleStreamBlock(Block):
    """Text and image as one sequence; attention and MLP side by side, as in arXiv 2302.05442."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, qk_scale: float | None = None
    ):
        super().__init__()
        self.hidden_dim = hidden_size
        self.num_heads = num_heads
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)
        # One projection for queries, keys, values and the MLP's first half, one for both ways back.
        self.linear1 = nn.Linear(hidden_size, hidden_size * 3 + self.mlp_hidden_dim)
        self.linear2 = nn.Linear(hidden_size + self.mlp_hidden_dim, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = layer_norm(hidden_size)
        self.modulation = Modulation(hidden_size, double=False)

    def modulate(self, vec: Tensor) -> Tensor:
        """What `forward` takes for `mod`, "B 3C"."""
        return self.modulation.project(vec)

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        pe: Tensor,
        given: KeysValues | None = None,
        keep: bool = False,
        num_txt: int = 0,
        weight: Tensor | None = None,
        mod: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The sequence one layer on: x "B N C" with its `num_txt` text tokens first, vec "B C", pe "B 1 N D/2
        2 2".

        Args:
            given: all tokens attend to these image keys and values instead of the sequence's own.
            keep: return queries, keys and values of all tokens, as they were used, as a second value.
            num_txt: where the image tokens begin; needed with `given` only.
            weight: how far the given ones replace its own, in a shape that fits "B H I D"; None: wholly.
            mod: what `modulate` made of `vec`, of each row or one for all; None: it is made here.
            exchange: for tokens that are a share of all, see `flux.runtime.parallel`.
        """
        products = self.products_for(x)
        own, _ = self.modulation.split(self.modulate(vec) if mod is None else mod)
        x_in = modulated(self.pre_norm, x, own, self.linear1)
        projection = self.linear1, self.norm, x_in, pe, self.num_heads

        hidden = None
        if replaces(given, weight) and in_parts(self.linear1):
            q = products.queries(*projection)
            of_txt = x_in[:, :num_txt], pe[:, :, :num_txt], self.num_heads
            txt_k, txt_v = products.keys_values(self.linear1, self.norm, *of_txt)
            k, v = one_sequence(txt_k, given[0]), one_sequence(txt_v, given[1])
        else:
            if exchange and in_parts(self.linear1):
                q, k, v = products.heads(*projection, of_more=True)
            else:
                q, k, v, hidden = products.heads_and_hidden(*projection)
            if given is not None:
                mixed = (blend(x[:, :, num_txt:], part, weight) for x, part in zip((k, v), given))
                k, v = (one_sequence(x[:, :, :num_txt], part) for x, part in zip((k, v), mixed))

        # What the MLP needs is computed while the exchange is under way.
        whole = begun(exchange, k, v)
        if hidden is None:
            hidden = products.hidden(self.linear1, x_in, 3 * self.hidden_dim)
        mixed = products.attend(q, *whole(), products.room(hidden, self.hidden_dim))
        x = products.contracted(x, own.gate, self.linear2, hidden, mixed)
        return (x, (q, k, v)) if keep else x


class LastLayer(nn.Module):
    """From the model's width back to packed latent channels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulate(self, vec: Tensor) -> Tensor:
        """What `forward` takes for `mod`, "B 2C"."""
        return self.adaLN_modulation(vec)

    def forward(self, x: Tensor, vec: Tensor, mod: Tensor | None = None) -> Tensor:
        """ "B I C" -> "B I channels"."""
        shift, scale = (self.modulate(vec) if mod is None else mod).unsqueeze(1).chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)
