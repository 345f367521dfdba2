"""Names of the models' tensors in the layouts that files come in: BFL's, diffusers', and GGUF's of T5.

The layouts differ in names, in which projections are one matrix, and in the order of the last modulation's
halves.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Part = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
"""A network of a model, by its folder in diffusers' layout: CLIP is "text_encoder", T5 "text_encoder_2"."""

# ---- the transformer in diffusers

DIFFUSERS_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DIFFUSERS_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
DIFFUSERS_BLOCKS = {
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
"""A module whose rows are shift, then scale; diffusers has scale, then shift."""


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The modules of diffusers' FluxTransformer2DModel that make up this module of `Flux`, in row order."""
    found = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", module)
    if found:
        stack, own = DIFFUSERS_BLOCKS[found[1]]
        return tuple(f"{stack}.{found[2]}.{name}" for name in own[found[3]])
    if module in DIFFUSERS_TOP:
        return (DIFFUSERS_TOP[module],)
    embedder, _, layer = module.rpartition(".")
    return (f"{DIFFUSERS_TOP[embedder]}.{DIFFUSERS_EMBEDDER[layer]}",)


def _transformer_in_diffusers(name: str) -> tuple[str, ...]:
    module, _, leaf = name.rpartition(".")
    return tuple(f"{their}.{leaf.replace('scale', 'weight')}" for their in diffusers_modules(module))


# ---- the autoencoder and T5

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
    if up:  # we number levels by resolution, diffusers in the order in which they run
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


# ---- the table of layouts


@dataclass(frozen=True)
class Layout:
    """One way to name a model's tensors.

    Attributes:
        signs: Names that identify the layout: a file has at least one of them, after one of the prefixes.
        prefixes: What may stand before all names; longer ones are those of all-in-one files.
        names: Maps a name of ours to the file's names.
        unused: A pattern of further names that the file may have.
        is_diffusers: Whether rows of `SWAPPED` and 1x1 convolutions are stored as diffusers does.
    """

    signs: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)
    names: Callable[[str], tuple[str, ...]] = _same
    unused: str = r"(?!)"
    is_diffusers: bool = False


T5_UNUSED = r"decoder\..*|(lm_head|encoder\.embed_tokens|shared)\.weight|spiece_model|logit_scale"
T5_GGUF_UNUSED = r"dec\..*|output\.weight"
CLIP_UNUSED = r"embeddings\.position_ids|(text|visual)_projection\.weight|logit_scale|vision_model\..*"
LAYOUTS: dict[Part, tuple[Layout, ...]] = {
    "transformer": (
        Layout(
            ("img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.qkv.weight"),
            ("", "model.diffusion_model.", "diffusion_model."),
        ),
        Layout(
            ("single_transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.proj_mlp.weight"),
            ("", "transformer."),
            _transformer_in_diffusers,
            is_diffusers=True,
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
            is_diffusers=True,
        ),
    ),
    "text_encoder_2": (
        Layout(
            ("encoder.block.0.layer.0.SelfAttention.k.weight", "encoder.final_layer_norm.weight"),
            ("", "text_encoders.t5xxl.transformer."),
            unused=T5_UNUSED,
        ),
        Layout(
            ("enc.blk.0.attn_q.weight", "enc.output_norm.weight"), names=_t5_in_gguf, unused=T5_GGUF_UNUSED
        ),
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
            unused=CLIP_UNUSED,
        ),
    ),
}
