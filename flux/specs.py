"""Every model this package knows: its sizes, where its files come from, and how it is meant to be used."""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flux.errors import InputError
from flux.model import FluxParams
from flux.modules.autoencoder import AutoEncoderParams

NANO_FOLDER = Path(__file__).parent / "assets" / "nano"

ConditionKind = Literal["control", "fill", "kontext", "redux"]
"""The ways in which an image steers a model: by channels beside the noise (a control map; a masked image and
its mask), by context tokens, or by text tokens."""

VITAL_LAYERS_DEV = (1, 0, 2, 18, 53, 28, 54, 17, 56, 25)
"""Vital layers of FLUX.1-dev (Stable Flow, appendix A.1), the most vital first (B.2)."""


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    Attributes:
        params: Sizes of the transformer.
        ae_params: Sizes of the autoencoder.
        repo_id: Repository on the hub. If None, the files are in `folder`, part of this package.
        repo_flow: File of the transformer in that repository or folder. If empty, the user names a file.
        repo_ae: File of the autoencoder in that repository or folder.
        folder: Folder of the files, for models of this package.
        condition: The kind of image that it is made to be steered by. If None, it takes none but Redux's.
        control: The map that steers it, if `condition` is "control".
        lora_repo_id: Repository of `lora_filename`. If None, it is beside `repo_flow`.
        lora_filename: File of a LoRA that turns the model in `repo_flow` into this one.
        lora_scale: Default strength of that LoRA.
        base_params: Sizes of the model in `repo_flow`, if there is such a LoRA.
        redux_repo_id: Repository of `redux_filename`. If None, it is beside `repo_flow`.
        redux_filename: File of the adapter that makes text tokens of images. If None, there is none.
        env_flow: Environment variables that name a local file of the transformer; the first that is set wins.
        env_ae: Environment variables that name a local file of the autoencoder, likewise.
        env_lora: Environment variables that name a local file of the LoRA, likewise.
        env_redux: Environment variables that name a local file of the Redux adapter, likewise.
        text_length: Number of T5 tokens that a prompt is padded or cut to.
        clip_length: Number of CLIP tokens that a prompt is padded or cut to.
        num_steps: Default number of steps.
        guidance: Default distilled guidance.
        true_cfg: Default of true CFG; 1 means off.
        size: Default width and height in pixels.
        shifted: Whether its schedule is shifted, see `flux.sampling.get_schedule`.
        base_shift: Shift of its schedule at 256 image tokens.
        max_shift: Shift of its schedule at 4096 image tokens.
        vital_layers: Its known vital layers, the most vital first. If None, nobody has published any.
        dinov2: The encoder that scores its images: a hub id or a folder.
        licence: The licence of a download.
        watermark: Whether its images get the invisible watermark by default.
        vocabulary: File of the words it was trained on, one a line. If None, it knows a whole language.
    """

    params: FluxParams
    ae_params: AutoEncoderParams
    repo_id: str | None
    repo_flow: str
    repo_ae: str = "ae.safetensors"
    folder: Path | None = None
    condition: ConditionKind | None = None
    control: Literal["canny", "depth"] | None = None
    lora_repo_id: str | None = None
    lora_filename: str | None = None
    lora_scale: float = 1.0
    base_params: FluxParams | None = None
    redux_repo_id: str | None = "black-forest-labs/FLUX.1-Redux-dev"
    redux_filename: str | None = "flux1-redux-dev.safetensors"
    env_flow: tuple[str, ...] = ()
    env_ae: tuple[str, ...] = ("FLUX_AE", "AE")
    env_lora: tuple[str, ...] = ()
    env_redux: tuple[str, ...] = ("FLUX_REDUX",)
    text_length: int = 512
    clip_length: int = 77
    num_steps: int = 50
    guidance: float = 3.5
    true_cfg: float = 1.0
    size: int = 1024
    shifted: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    vital_layers: tuple[int, ...] | None = None
    dinov2: str = "facebook/dinov2-giant"
    licence: str = "FLUX.1 [dev] non-commercial"
    watermark: bool = True
    vocabulary: Path | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers, which are numbered from 0: double-stream blocks first."""
        return self.params.depth + self.params.depth_single_blocks


_DEV = FluxParams(
    hidden_size=3072, num_heads=24, mlp_ratio=4.0, depth=19, depth_single_blocks=38, qkv_bias=True,
    guidance_embed=True, in_channels=64, out_channels=64, context_in_dim=4096, vec_in_dim=768, axes_dim=[16,
    56, 56], theta=10_000,
)  # fmt: skip
_AE = AutoEncoderParams(
    resolution=256, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, in_channels=3, out_ch=3, z_channels=16,
    scale_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip

_NANO = ModelSpec(
    params=replace(
        _DEV, vec_in_dim=128, context_in_dim=256, hidden_size=320, num_heads=5, depth=5,
        depth_single_blocks=10, axes_dim=[8, 28, 28],
    ),
    ae_params=replace(_AE, ch=32, num_res_blocks=1, num_groups=16),
    repo_id=None,
    repo_flow="transformer.safetensors",
    folder=NANO_FOLDER,
    redux_repo_id=None,
    redux_filename=None,
    # The small models are part of the package: variables set for the large ones must not change them.
    env_ae=(),
    env_redux=(),
    text_length=40,
    clip_length=40,
    num_steps=20,
    size=256,
    vital_layers=(4, 0),  # the most vital first, like every such set
    dinov2=str(NANO_FOLDER / "dinov2"),
    licence="Apache-2.0",
    # Its images cannot be mistaken for photographs, and at this size the mark shows in plain skies.
    watermark=False,
    vocabulary=NANO_FOLDER / "vocabulary.txt",
)  # fmt: skip


def _nano_tool(name: str, condition: ConditionKind, channels: int, **changes: Any) -> ModelSpec:
    """Make the spec of flux-nano with a LoRA for images of one kind. The arguments are those of `_tool`."""
    return replace(
        _NANO,
        params=replace(_NANO.params, in_channels=channels),
        condition=condition,
        lora_filename=f"{name}_lora.safetensors",
        base_params=_NANO.params,
        guidance=1.0,  # what the LoRAs were trained with
        **changes,
    )


_DEV_SPEC = ModelSpec(
    params=_DEV,
    ae_params=_AE,
    repo_id="black-forest-labs/FLUX.1-dev",
    repo_flow="flux1-dev.safetensors",
    env_flow=("FLUX_DEV", "FLUX_MODEL"),
    vital_layers=VITAL_LAYERS_DEV,
)


def _tool(name: str, condition: ConditionKind, channels: int, guidance: float, **changes: Any) -> ModelSpec:
    """Make the spec of a model that Black Forest Labs trained from dev, with a repository of its own.

    Args:
        name: The model's name in file names.
        condition: The kind of image that steers it.
        channels: Channels of an image token that goes in.
        guidance: Default distilled guidance.
        changes: Other fields.
    """
    return replace(
        _DEV_SPEC,
        params=replace(_DEV, in_channels=channels),
        repo_id=f"black-forest-labs/FLUX.1-{name.capitalize()}-dev",
        repo_flow=f"flux1-{name}-dev.safetensors",
        env_flow=(f"FLUX_DEV_{name.upper()}", "FLUX_MODEL"),
        condition=condition,
        guidance=guidance,
        vital_layers=None,
        **changes,
    )


def _control_lora(spec: ModelSpec) -> ModelSpec:
    """Make the spec of dev with the LoRA that turns it into a control model of this kind."""
    return replace(
        spec,
        repo_id=_DEV_SPEC.repo_id,
        repo_flow=_DEV_SPEC.repo_flow,
        env_flow=_DEV_SPEC.env_flow,
        lora_repo_id=f"{spec.repo_id}-lora",
        lora_filename=spec.repo_flow.replace("-dev.", "-dev-lora."),
        lora_scale=0.85,
        base_params=_DEV,
        env_lora=(f"{spec.env_flow[0]}_LORA", "FLUX_LORA"),
    )


_CANNY = _tool("canny", "control", 128, 30.0, control="canny")
_DEPTH = _tool("depth", "control", 128, 10.0, control="depth")

configs: dict[str, ModelSpec] = {
    "flux-dev": _DEV_SPEC,
    "flux-dev-krea": ModelSpec(
        params=_DEV,
        ae_params=_AE,
        repo_id="black-forest-labs/FLUX.1-Krea-dev",
        repo_flow="flux1-krea-dev.safetensors",
        env_flow=("FLUX_DEV_KREA", "FLUX_MODEL"),
        guidance=4.5,
    ),
    "flux-schnell": ModelSpec(
        params=replace(_DEV, guidance_embed=False),
        ae_params=_AE,
        repo_id="black-forest-labs/FLUX.1-schnell",
        repo_flow="flux1-schnell.safetensors",
        env_flow=("FLUX_SCHNELL", "FLUX_MODEL"),
        text_length=256,
        num_steps=4,
        shifted=False,
        licence="Apache-2.0",
    ),
    # Fine-tuned to need no distilled guidance. There are several, whose files look like schnell's.
    "flux-dev-de-distilled": ModelSpec(
        params=replace(_DEV, guidance_embed=False),
        ae_params=_AE,
        repo_id="black-forest-labs/FLUX.1-dev",
        repo_flow="",
        env_flow=("FLUX_DEV_DE_DISTILLED", "FLUX_MODEL"),
        true_cfg=3.5,
    ),
    "flux-dev-kontext": _tool("kontext", "kontext", 64, 2.5, num_steps=30),
    "flux-dev-fill": _tool("fill", "fill", 384, 30.0, text_length=128),
    "flux-dev-canny": _CANNY,
    "flux-dev-depth": _DEPTH,
    "flux-dev-canny-lora": _control_lora(_CANNY),
    "flux-dev-depth-lora": _control_lora(_DEPTH),
    # Dev itself: any text-to-image model can take Redux's images.
    "flux-dev-redux": replace(_DEV_SPEC, condition="redux", guidance=2.5),
    "flux-nano": _NANO,
    "flux-nano-schnell": replace(
        _NANO,
        params=replace(_NANO.params, guidance_embed=False),
        lora_filename="schnell_lora.safetensors",
        base_params=_NANO.params,
        num_steps=4,
        shifted=False,
        vital_layers=(4, 0),
    ),
    "flux-nano-kontext": _nano_tool(
        "kontext", "kontext", 64, vocabulary=NANO_FOLDER / "vocabulary_kontext.txt"
    ),
    "flux-nano-fill": _nano_tool("fill", "fill", 384),
    "flux-nano-canny": _nano_tool("canny", "control", 128, control="canny"),
}


@dataclass(frozen=True)
class HostedModel:
    """A model that only Black Forest Labs runs, see `flux.bfl`.

    Attributes:
        largest_side: Largest width and height in pixels.
        steps: Smallest and largest number of steps. If None, the model chooses.
        guidance: Smallest and largest guidance. If None, the model chooses.
        shape_only: Whether only the ratio of width and height counts.
    """

    largest_side: int = 1440
    steps: tuple[int, int] | None = None
    guidance: tuple[float, float] | None = None
    shape_only: bool = False


HOSTED = {
    "flux-pro": HostedModel(steps=(1, 50), guidance=(1.5, 5)),
    "flux-pro-1.1": HostedModel(),
    "flux-pro-1.1-ultra": HostedModel(shape_only=True),
    "flux-kontext-pro": HostedModel(shape_only=True),
    "flux-kontext-max": HostedModel(shape_only=True),
    "flux-2-pro": HostedModel(largest_side=2048),
    "flux-2-max": HostedModel(largest_side=2048),
    "flux-2-flex": HostedModel(largest_side=2048, steps=(1, 50), guidance=(1.5, 10)),
}


def _words(name: str) -> set[str]:
    """The words that tell models apart: those of "flux-dev-kontext" are those of "FLUX.1-Kontext-dev"."""
    return set(re.findall("[a-z]+", name.lower())) - {"flux", "black", "forest", "labs"}


def get_spec(name: str) -> ModelSpec:
    """Return the model of that name.

    Raises:
        InputError: The name is unknown, with the nearest known one, or belongs to a hosted model.
    """
    if name in HOSTED:
        raise InputError(
            f"Got model {name!r}, which only Black Forest Labs runs: its layers are not here, so nothing can "
            f"be skipped, injected, watched or edited in it. It makes images: python -m flux --name {name}"
        )
    if name not in configs:
        near = [known for known in configs if _words(name) and _words(name) <= _words(known)]
        near += difflib.get_close_matches(name, configs, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise InputError(f"Got unknown model {name!r}{hint} Known are {', '.join(configs)}")
    return configs[name]


def encoder_of(model: str) -> str:
    """Return the DINOv2 of one of our models. Any other name is a hub id or a folder and stays as it is."""
    return configs[model].dinov2 if model in configs else model
