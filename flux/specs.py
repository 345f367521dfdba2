"""Every model this package knows: its sizes, where its files come from, and how it is meant to be used."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from flux.bfl import HOSTED, refusal
from flux.errors import InputError
from flux.model import FluxParams
from flux.modules.autoencoder import AutoEncoderParams

NANO_FOLDER = Path(__file__).parent / "assets" / "nano"

VITAL_LAYERS_DEV = (1, 0, 2, 18, 53, 28, 54, 17, 56, 25)
"""Vital layers of FLUX.1-dev (Stable Flow, appendix A.1), the most vital first (B.2)."""


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    Attributes:
        repo_id: repository on the hub; None: the files are in `folder`, part of this package.
        repo_flow, repo_ae: file of the transformer and of the autoencoder in that repository or folder.
        lora: file of a difference, beside `repo_flow`, that makes this model of the one in that file.
        env_flow, env_ae: environment variables that name a local file instead, the first that is set wins.
        text_length: T5 tokens a prompt is padded or cut to; clip_length the same for CLIP.
        num_steps, guidance, true_cfg, size: defaults; size is a side in pixels.
        shifted, base_shift, max_shift: its schedule, as in `flux.sampling.get_schedule`.
        vital_layers: its known vital layers, the most vital first; None: nobody has published any.
        dinov2: the encoder that scores its pictures, a hub id or a folder.
        licence: what a download of it is bound to.
        watermark: whether its pictures are marked by default.
        vocabulary: file of the words it was trained on, one a line; None: a language's own.
    """

    params: FluxParams
    ae_params: AutoEncoderParams
    repo_id: str | None
    repo_flow: str
    repo_ae: str = "ae.safetensors"
    folder: Path | None = None
    lora: str | None = None
    env_flow: tuple[str, ...] = ()
    env_ae: tuple[str, ...] = ("FLUX_AE", "AE")
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
    # The small models are part of the package: variables set for the large ones leave them alone.
    env_ae=(),
    text_length=40,
    clip_length=40,
    num_steps=20,
    size=256,
    vital_layers=(4, 0),  # the most vital first, like every such set
    dinov2=str(NANO_FOLDER / "dinov2"),
    licence="Apache-2.0",
    # Nobody takes its pictures for photographs, and at this size the mark shows in plain skies.
    watermark=False,
    vocabulary=NANO_FOLDER / "vocabulary.txt",
)  # fmt: skip

configs: dict[str, ModelSpec] = {
    "flux-dev": ModelSpec(
        params=_DEV,
        ae_params=_AE,
        repo_id="black-forest-labs/FLUX.1-dev",
        repo_flow="flux1-dev.safetensors",
        env_flow=("FLUX_DEV", "FLUX_MODEL"),
        vital_layers=VITAL_LAYERS_DEV,
    ),
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
    "flux-nano": _NANO,
    "flux-nano-schnell": replace(
        _NANO,
        params=replace(_NANO.params, guidance_embed=False),
        lora="schnell_lora.safetensors",
        num_steps=4,
        shifted=False,
        vital_layers=(4, 0),
    ),
}


def get_spec(name: str) -> ModelSpec:
    """The model of that name. Raises InputError, naming near ones, if there is none."""
    if name in HOSTED:
        raise InputError(refusal(name))
    if name not in configs:
        near = difflib.get_close_matches(name, configs, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise InputError(f"Got unknown model {name!r}{hint} Known are {', '.join(configs)}")
    return configs[name]


def encoder_of(model: str) -> str:
    """The DINOv2 of one of our models, or the hub id or folder that was given instead."""
    return configs[model].dinov2 if model in configs else model
