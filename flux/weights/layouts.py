"""Names of the models' tensors in the layouts that files come in, and how each of ours is made of a file's.

The layouts differ in names, in which projections are one matrix, and in the order of the last modulation's
halves.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.errors import InputError
from flux.modules import gguf_blocks
from flux.weights.checkpoint import Checkpoint
from flux.weights.scales import EIGHT_BIT_FLOATS, ScaledTensor

Part = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
"""A network of a model, by its folder in diffusers' layout: CLIP is "text_encoder", T5 "text_encoder_2"."""

# ---- one tensor


@dataclass(frozen=True)
class TensorSource:
    """How one of our tensors is made: these tensors of a file, concatenated along their rows.

    Attributes:
        parts: The file's tensors.
        swapped: Whether the file has the two halves of the rows in the other order.
        pointwise: Whether the file has a 1x1 convolution as a matrix, without the two last axes.
        columns: Columns of the matrix, if it has more than the file's: those are zero. If None, it has not.
    """

    parts: tuple[ScaledTensor, ...]
    swapped: bool = False
    pointwise: bool = False
    columns: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result; empty if the parts' shapes do not match."""
        first, *others = (part.shape for part in self.parts)
        if others and (not first or any(shape[1:] != first[1:] for shape in others)):
            return ()
        # Queries, keys and values have equally many rows; a fourth part may have another number.
        if any(shape[:1] != first[:1] for shape in others[:2]):
            return ()
        rows = first[:1] and (sum(part.shape[0] for part in self.parts),)
        rest = first[1:] if self.columns is None else (self.columns,)
        return (*rows, *rest, *((1, 1) if self.pointwise else ()))

    @property
    def kind(self) -> str | None:
        """The number format of all parts; None if they differ."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def is_packed(self) -> bool:
        """Whether a matrix can stay as it is stored: GGUF blocks, or 8-bit floats from one tensor."""
        if self.columns is not None:
            return False
        if self.kind in EIGHT_BIT_FLOATS:
            return len(self.parts) == 1 and not self.swapped
        return self.kind in gguf_blocks.BLOCKS

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Read the tensor in `dtype`."""
        whole = self._joined([part.read(device, is_filled=True).to(dtype) for part in self.parts])
        if self.columns is not None:
            whole = F.pad(whole, (0, self.columns - whole.shape[1]))
        return whole[..., None, None] if self.pointwise else whole

    def read_packed(self, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Read a packed matrix as uint8, "rows bytes", and its scale, if it has one."""
        whole = self._joined([part.stored.read(device, is_filled=True) for part in self.parts]).view(
            torch.uint8
        )
        return whole, self.parts[0].read_scale(device)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole


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


# ---- what a file holds


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
TITLES: dict[Part, str] = {
    "transformer": "a FLUX.1 transformer",
    "vae": "an autoencoder",
    "text_encoder_2": "a T5 encoder",
    "text_encoder": "a CLIP text encoder",
}
# Other models, each by a pattern that one of its tensors' names matches.
OTHER_MODELS = (
    (r"^redux_(up|down)\.", "a Redux adapter (give it as redux_weights)"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma transformer"),
    (r"(^|\.)double_stream_modulation_img\.", "a FLUX.2 transformer"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "a HunyuanVideo transformer"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"^pos_embed\.proj\.weight$", "a Stable Diffusion 3 transformer"),
    (r"^conditioner\.embedders\.|(^|\.)label_emb\.0\.|^add_embedding\.linear_1\.", "an SDXL model"),
    (r"(^|\.)input_blocks\.0\.0\.|^time_embedding\.linear_1\.", "a Stable Diffusion model"),
)
ADAPTER = r"(^|[._])(lora|lokr|hada)_|\.processor\.|\.lora\."


def holds_part(checkpoint: Checkpoint, part: Part) -> bool:
    """Whether a checkpoint holds this network."""
    return _find_layout(checkpoint.tensors, part) is not None


def describe_file(names: Iterable[str]) -> str:
    """Describe a file with tensors of these names, for a message."""
    names = list(names)
    for pattern, title in OTHER_MODELS:
        if any(re.search(pattern, name) for name in names):
            return title
    titles = [TITLES[part] for part in LAYOUTS if _find_layout(names, part)]
    if titles:
        return " and ".join(titles)
    if any(re.search(ADAPTER, name) for name in names):
        return "a LoRA or another adapter (give it as lora, beside the model)"
    example = f" (it begins with {names[0][:60]!r})" if names else ""
    return f"{len(names)} tensors of a model not known here{example}"


def _find_layout(names: Iterable[str], part: Part) -> tuple[Layout, str] | None:
    """The layout of this network among a file's names, and the prefix of its names."""
    names = set(names)
    if part == "transformer" and any(re.search(sign, name) for sign, _ in OTHER_MODELS for name in names):
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


def require_part(checkpoint: Checkpoint, part: Part) -> tuple[Layout, str]:
    """The layout and prefix of this network's names in a checkpoint.

    Raises:
        InputError: The checkpoint does not hold the network. The message says what it holds.
    """
    found = _find_layout(checkpoint.tensors, part)
    if found is None:
        holds = describe_file(checkpoint.tensors)
        raise InputError(f"Got {checkpoint.path}, which is {holds}; expected {TITLES[part]}")
    return found


def _other_name(name: str) -> str | None:
    """The second name that files of our own layout have for this tensor."""
    if name == "shared.weight":  # T5's one embedding
        return "encoder.embed_tokens.weight"
    if name.endswith("_norm.scale"):  # as ComfyUI writes norms
        return name.removesuffix("scale") + "weight"
    return None


def find_sources(
    checkpoint: Checkpoint, part: Part, names: Iterable[str]
) -> tuple[dict[str, TensorSource], list[str]]:
    """Find how each of a network's tensors is made of a checkpoint's.

    Args:
        checkpoint: The opened file or folder.
        part: The network.
        names: Names of the network's tensors.

    Returns:
        A source for each name that the checkpoint has all parts of; and the names in the checkpoint that
        belong to the network by their prefix but are not used.

    Raises:
        InputError: The checkpoint does not hold the network. The message says what it holds.
    """
    layout, prefix = require_part(checkpoint, part)
    left = {name for name in checkpoint.tensors if name.startswith(prefix)}
    sources = {}
    for name in names:
        theirs = [prefix + their for their in layout.names(name)]
        other = _other_name(name)
        if other is not None and theirs[0] not in left:
            theirs = [prefix + other]
        if all(their in left for their in theirs):
            sources[name] = TensorSource(
                tuple(checkpoint.tensors[their] for their in theirs),
                swapped=layout.is_diffusers and name.startswith(SWAPPED),
                pointwise=layout.is_diffusers
                and bool(re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", name)),
            )
            left -= set(theirs)
    return sources, sorted(name for name in left if not re.fullmatch(layout.unused, name[len(prefix) :]))
