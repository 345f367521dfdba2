"""The names of each net's tensors in the layouts that files come in, and what a file holds by its names.

The layouts differ in names, in which projections are one matrix, and in the order of the last modulation's
halves. Each `Source` says how one tensor of ours is made of a file's.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules import gguf_blocks
from flux.weights.checkpoint import EIGHT_BIT, Checkpoint, Weight

# ---- one tensor


@dataclass(frozen=True)
class Source:
    """How a tensor of ours is made: these, one below the other.

    Attributes:
        swapped: the two halves of the rows stand the other way round in the file.
        pointwise: the file has the matrix of a 1x1 convolution without its two last axes.
    """

    parts: tuple[Weight, ...]
    swapped: bool = False
    pointwise: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole; empty if the parts do not go together."""
        first, *others = (part.shape for part in self.parts)
        if others and (not first or any(shape[1:] != first[1:] for shape in others)):
            return ()
        # Queries, keys and values are of one size; what else is below them may have another.
        if any(shape[:1] != first[:1] for shape in others[:2]):
            return ()
        rows = first[:1] and (sum(part.shape[0] for part in self.parts),)
        return (*rows, *first[1:], *((1, 1) if self.pointwise else ()))

    @property
    def kind(self) -> str | None:
        """The kind all parts are of, None if they are of several."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def is_packed(self) -> bool:
        """Whether a matrix can stay as it is stored: GGUF's blocks, or 8-bit floats of one scale."""
        if self.kind in EIGHT_BIT:
            return len(self.parts) == 1 and not self.swapped
        return self.kind in gguf_blocks.BLOCKS

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The whole in `dtype`."""
        whole = self._joined([part.read(device).to(dtype) for part in self.parts])
        return whole[..., None, None] if self.pointwise else whole

    def read_packed(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """The whole as bytes, "rows bytes", and its scale."""
        whole = self._joined([part.stored.read(device) for part in self.parts]).view(torch.uint8)
        first = self.parts[0]
        return whole, None if first.scale is None else first.read_scale(device)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole


# ---- the transformer in diffusers

TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
EMBEDDER_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
BLOCKS = {
    "double": (
        "transformer_blocks",
        {
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_attn.norm.query_norm": ("attn.norm_q",),
            "img_attn.norm.key_norm": ("attn.norm_k",),
            "txt_attn.norm.query_norm": ("attn.norm_added_q",),
            "txt_attn.norm.key_norm": ("attn.norm_added_k",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    "single": (
        "single_transformer_blocks",
        {
            "modulation.lin": ("norm.linear",),
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "norm.query_norm": ("attn.norm_q",),
            "norm.key_norm": ("attn.norm_k",),
        },
    ),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""Its rows are shift, then scale; diffusers has scale, then shift."""


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The modules of diffusers' FluxTransformer2DModel that make up this one of `Flux`, in order of rows."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if found:
        stack, own = BLOCKS[found[1]]
        return tuple(f"{stack}.{found[2]}.{name}" for name in own[found[3]])
    if module in TOP:
        return (TOP[module],)
    embedder, _, layer = module.rpartition(".")
    return (f"{TOP[embedder]}.{EMBEDDER_LAYERS[layer]}",)


def _transformer_in_diffusers(name: str) -> tuple[str, ...]:
    module, _, leaf = name.rpartition(".")
    return tuple(f"{their}.{leaf.replace('scale', 'weight')}" for their in diffusers_modules(module))


# ---- the other nets

AE_IN_DIFFUSERS = (
    (r"norm_out", "conv_norm_out"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.(q|k|v)\b", r"mid_block.attentions.0.to_\1"),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"\bdown\.(\d+)\.block", r"down_blocks.\1.resnets"),
    (r"\bdown\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0"),
)
AE_LEVELS = 4


def _ae_in_diffusers(name: str) -> tuple[str, ...]:
    for pattern, theirs in AE_IN_DIFFUSERS:
        name = re.sub(pattern, theirs, name)
    up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)(.*)", name)
    if up:  # numbered by resolution here, in the order they run there
        part = "resnets" if up[2] == "block" else "upsamplers.0"
        name = f"decoder.up_blocks.{AE_LEVELS - 1 - int(up[1])}.{part}{up[3]}"
    return (name,)


T5_IN_GGUF = (
    (r"shared\.", "token_embd."),
    (r"encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"encoder\.block\.", "enc.blk."),
    (r"layer\.0\.layer_norm\.", "attn_norm."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "attn_rel_b."),
    (r"layer\.0\.SelfAttention\.", "attn_"),
    (r"layer\.1\.layer_norm\.", "ffn_norm."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn_gate."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn_up."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn_down."),
)


def _t5_in_gguf(name: str) -> tuple[str, ...]:
    for pattern, theirs in T5_IN_GGUF:
        name = re.sub(pattern, theirs, name)
    return (name,)


def _same(name: str) -> tuple[str, ...]:
    return (name,)


# ---- what a file holds


@dataclass(frozen=True)
class Layout:
    """One way to name a net's tensors.

    Attributes:
        signs: names of which a file in this layout has one, after one of the prefixes.
        names: a name of ours -> the names there.
        others: names that may be there too and are of no use.
    """

    signs: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)
    names: Callable[[str], tuple[str, ...]] = _same
    others: str = r"(?!)"


# The prefixes are those of all-in-one files.
T5_OTHERS = r"decoder\..*|(lm_head|encoder\.embed_tokens|shared)\.weight|spiece_model|logit_scale"
CLIP_OTHERS = r"embeddings\.position_ids|text_projection\.weight|logit_scale|vision_model\..*"
LAYOUTS = {
    "transformer": (
        Layout(
            ("img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.qkv.weight"),
            ("", "model.diffusion_model.", "diffusion_model."),
        ),
        Layout(
            ("single_transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"),
            ("", "transformer."),
            _transformer_in_diffusers,
        ),
    ),
    "vae": (
        Layout(
            ("decoder.mid.attn_1.q.weight", "encoder.mid.attn_1.q.weight"),
            ("", "vae.", "first_stage_model."),
        ),
        Layout(
            ("decoder.mid_block.attentions.0.to_q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
            ("", "vae."),
            _ae_in_diffusers,
        ),
    ),
    "text_encoder_2": (
        Layout(
            ("encoder.block.0.layer.0.SelfAttention.k.weight", "encoder.final_layer_norm.weight"),
            ("", "text_encoders.t5xxl.transformer."),
            others=T5_OTHERS,
        ),
        Layout(("enc.blk.0.attn_q.weight", "enc.output_norm.weight"), names=_t5_in_gguf),
    ),
    "text_encoder": (
        Layout(
            ("embeddings.token_embedding.weight", "final_layer_norm.weight"),
            (
                "",
                "text_model.",
                "text_encoders.clip_l.transformer.text_model.",
                "text_encoders.clip_l.transformer.",
            ),
            others=CLIP_OTHERS,
        ),
    ),
}
TITLES = {
    "transformer": "a FLUX.1 transformer",
    "vae": "an autoencoder",
    "text_encoder_2": "a T5 encoder",
    "text_encoder": "a CLIP text encoder",
}
# Other nets, by a name each of them has, wherever it stands in the file's own names.
FOREIGN = (
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma transformer"),
    (r"(^|\.)double_stream_modulation_img\.", "a FLUX.2 transformer"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "a HunyuanVideo transformer"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"^pos_embed\.proj\.weight$", "a Stable Diffusion 3 transformer"),
    (r"^conditioner\.embedders\.|(^|\.)label_emb\.0\.|^add_embedding\.linear_1\.", "an SDXL model"),
    (r"(^|\.)input_blocks\.0\.0\.|^time_embedding\.linear_1\.", "a Stable Diffusion model"),
)
ADAPTER = r"(^|[._])(lora|lokr|hada)_|\.processor\.|\.lora\."


def holds(checkpoint: Checkpoint, part: str) -> bool:
    """Whether the file has this net, by the name of its folder in diffusers' layout."""
    return _find(checkpoint.weights, part) is not None


def describe(names: Iterable[str]) -> str:
    """What a file with tensors of these names is, in words."""
    names = list(names)
    for pattern, title in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            return title
    parts = [TITLES[part] for part in LAYOUTS if _find(names, part)]
    if parts:
        return " and ".join(parts)
    if any(re.search(ADAPTER, name) for name in names):
        return "a LoRA or another adapter (give it as lora, beside the model)"
    example = f" (it begins with {names[0][:60]!r})" if names else ""
    return f"{len(names)} tensors of a net not known here{example}"


def _find(names: Iterable[str], part: str) -> tuple[Layout, str] | None:
    """The layout of this net in a file, and the prefix of its names there."""
    names = set(names)
    if part == "transformer" and any(re.search(pattern, name) for pattern, _ in FOREIGN for name in names):
        return None
    return next(
        (
            (layout, prefix)
            for layout in LAYOUTS[part]
            for prefix in layout.prefixes
            if any(prefix + sign in names for sign in layout.signs)
        ),
        None,
    )


def sources(checkpoint: Checkpoint, part: str, names: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
    """How each of a net's tensors is made of a file's.

    Args:
        part: "transformer", "vae", "text_encoder" (CLIP) or "text_encoder_2" (T5).
        names: of the net's tensors.

    Returns:
        A source for each name for which the file has all that is needed; and the names in the file that are
        the net's by their prefix, and of no use to it.

    Raises:
        InputError: the file does not hold such a net; the message says what it holds.
    """
    found = _find(checkpoint.weights, part)
    if found is None:
        what = describe(checkpoint.weights)
        raise InputError(f"Got {checkpoint.path}, which is {what}; expected {TITLES[part]}")
    layout, prefix = found
    left = {name for name in checkpoint.weights if name.startswith(prefix)}
    made = {}
    for name in names:
        theirs = [prefix + their for their in layout.names(name)]
        # T5's one embedding has two names; a file may have either.
        if name == "shared.weight" and theirs[0] not in left:
            theirs = [prefix + "encoder.embed_tokens.weight"]
        if all(their in left for their in theirs):
            diffusers = layout.names in (_transformer_in_diffusers, _ae_in_diffusers)
            made[name] = Source(
                tuple(checkpoint.weights[their] for their in theirs),
                swapped=diffusers and name.startswith(SWAPPED),
                pointwise=diffusers and bool(re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)),
            )
            left -= set(theirs)
    return made, sorted(name for name in left if not re.fullmatch(layout.others, name[len(prefix) :]))
