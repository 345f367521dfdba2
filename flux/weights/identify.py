"""Which network a file holds, told by the names of its tensors, whatever the file is called."""

import re
from collections.abc import Iterable

from flux.errors import InputError
from flux.weights.checkpoint import Checkpoint
from flux.weights.layouts import LAYOUTS, Layout, Part

TITLES: dict[Part, str] = {
    "transformer": "a FLUX.1 transformer",
    "vae": "an autoencoder",
    "text_encoder_2": "a T5 encoder",
    "text_encoder": "a CLIP text encoder",
}
# The field of settings that each network is given in.
FIELDS: dict[Part, str] = {
    "transformer": "weights",
    "vae": "ae_weights",
    "text_encoder_2": "t5_weights",
    "text_encoder": "clip_weights",
}
# Other models, each by a pattern that one of its tensors' names matches. No file of FLUX.1 matches one.
OTHER_MODELS = (
    (r"^redux_(up|down)\.", "a Redux adapter (give it as redux_weights)"),
    (r"(^|\.)distilled_guidance_layer\.", "a Chroma transformer"),
    (r"(^|\.)double_stream_modulation_img\.", "a FLUX.2 transformer"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "a HunyuanVideo transformer"),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", "a Qwen-Image transformer"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.", "a Wan transformer"),
    (r"(^|\.)noise_refiner\.\d+\.", "a Lumina or Z-Image transformer"),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model"),
    (r"^pos_embed\.proj\.weight$", "a Stable Diffusion 3 transformer"),
    (r"^conditioner\.embedders\.|(^|\.)label_emb\.0\.|^add_embedding\.linear_1\.", "an SDXL model"),
    (r"(^|\.)input_blocks\.0\.0\.|^time_embedding\.linear_1\.", "a Stable Diffusion model"),
    (r"(^|\.)controlnet_", "a ControlNet, which is not supported"),
    (r"(^|[._])ip_adapter", "an IP-Adapter, which is not supported"),
)
# Asked only about files that hold no network of FLUX.1.
OTHER_FILES = (
    (r"^(model\.layers|blk)\.\d+\.(self_attn|attn_q|attn_qkv|attn_k)\b", "a language model"),
    (r"(^|[._])(lora|lokr|hada)_|\.processor\.|\.lora\.", "a LoRA or another adapter (give it as lora)"),
    (r"^(vision_model|visual)\.", "an image encoder"),
)
# Models that a LoRA may be for, each by a pattern that one of its modules' names matches.
OTHER_LORAS = (
    (r"(^|[._])(down|up|mid|input|output|middle)_blocks?[._]|^lora_te2_text_model", "Stable Diffusion"),
    (r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]", "Qwen-Image"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._]", "Wan"),
)
# The entries of metadata in which a file says what it is, or what it was trained for.
DECLARATIONS = ("general.architecture", "modelspec.architecture", "ss_base_model_version")


def holds_part(checkpoint: Checkpoint, part: Part) -> bool:
    """Whether a checkpoint holds this network."""
    return _find_layout(checkpoint.tensors, part) is not None


def require_part(checkpoint: Checkpoint, part: Part) -> tuple[Layout, str]:
    """The layout and prefix of this network's names in a checkpoint.

    Raises:
        InputError: The checkpoint does not hold the network. The message says what it holds.
    """
    found = _find_layout(checkpoint.tensors, part)
    if found is None:
        holds = describe_checkpoint(checkpoint)
        raise InputError(f"Got {checkpoint.path}, which is {holds}; expected {TITLES[part]}")
    return found


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Describe what a checkpoint holds, for a message: "a T5 encoder (give it as t5_weights)"."""
    names = list(checkpoint.tensors)
    if other := _first_match(OTHER_MODELS, names):
        return other
    parts: list[Part] = [part for part in LAYOUTS if _find_layout(names, part)]
    if parts:
        field = f" (give it as {FIELDS[parts[0]]})" if len(parts) == 1 else ""
        return " and ".join(TITLES[part] for part in parts) + field
    if other := _first_match(OTHER_FILES, names):
        return other
    example = f" (it begins with {names[0][:60]!r})" if names else ""
    return f"{len(names)} tensors of a model not known here{example}{declared_model(checkpoint)}"


def model_of_lora(modules: list[str]) -> str | None:
    """The other model that modules of these names in a LoRA file belong to, if they tell."""
    return _first_match(OTHER_LORAS, modules)


def declared_model(checkpoint: Checkpoint) -> str:
    """A note of the model that a file's metadata names, for the end of a message; empty if there is none."""
    metadata = checkpoint.metadata
    names = [metadata[key] for key in DECLARATIONS if metadata.get(key)]
    return f"; it says that it is for {names[0][:60]!r}" if names else ""


def _first_match(titles: Iterable[tuple[str, str]], names: list[str]) -> str | None:
    """The first title whose pattern one of these names matches."""
    return next((title for sign, title in titles if any(re.search(sign, name) for name in names)), None)


def _find_layout(names: Iterable[str], part: Part) -> tuple[Layout, str] | None:
    """The layout of this network among a file's names, and the prefix of its names."""
    names = set(names)
    if part == "transformer" and _first_match(OTHER_MODELS, list(names)):
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
