"""One model's files, each opened once: what is checked, planned, fingerprinted and loaded."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from flux.errors import InputError, warn
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.specs import ModelSpec, configs
from flux.weights.checkpoint import Checkpoint, open_checkpoint
from flux.weights.fold_guidance import fold_guidance
from flux.weights.headers import read_json
from flux.weights.identify import TITLES
from flux.weights.layouts import Part
from flux.weights.load import load_into, match_names, on_meta
from flux.weights.lora import LoraFile, read_lora
from flux.weights.lora_patches import Patch, apply_patches, ranks_beside
from flux.weights.lora_places import match_patches
from flux.weights.sources import TensorSource
from flux.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PretrainedConfig, PreTrainedTokenizerBase, T5EncoderModel

M = TypeVar("M", bound=nn.Module)
TOKENIZERS: dict[Part, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
EMBEDDINGS: dict[Part, str] = {
    "text_encoder": "embeddings.token_embedding.weight",
    "text_encoder_2": "shared.weight",
}
# By a pattern of a file's and its folder's name: as which model it is loaded, and which one its name says.
LOOK_ALIKE = (
    (r"(de|un)[-_ .]?distil", "flux-schnell", "flux-dev-de-distilled"),
    (r"schnell", "flux-dev-de-distilled", "flux-schnell"),
    (r"kontext", "flux-dev", "flux-dev-kontext"),
    (r"depth", "flux-dev-canny", "flux-dev-depth"),
    (r"canny", "flux-dev-depth", "flux-dev-canny"),
)


class LoraUse(NamedTuple):
    """A LoRA file and how it is applied.

    Attributes:
        path: The file.
        strength: The factor of its changes.
        layers: See `flux.weights.lora.LoraFile`.
    """

    path: Path
    strength: float = 1.0
    layers: Sequence[int] | Mapping[int, float] | None = None


@dataclass(frozen=True)
class ModelFiles:
    """Where one model's files are. Each path is a file, or a folder in diffusers' layout.

    Attributes:
        flow: The transformer.
        ae: The autoencoder.
        text: The folder with `flux.weights.hub.TEXT_FOLDERS`: text encoders and tokenizers.
        t5: The T5 encoder's weights. If None, they are in `text`.
        clip: The CLIP encoder's weights. If None, they are in `text`.
        loras: LoRA files.
        own_lora: The LoRA that turns the model in `flow` into this one. If None, `flow` is this one.
    """

    flow: Path
    ae: Path
    text: Path
    t5: Path | None = None
    clip: Path | None = None
    loras: tuple[LoraUse, ...] = ()
    own_lora: LoraUse | None = None

    def of(self, part: Part) -> Path:
        """The path of one of the networks."""
        own = {"transformer": self.flow, "vae": self.ae, "text_encoder": self.clip, "text_encoder_2": self.t5}
        return own[part] or self.text


class OpenFiles:
    """Checkpoints by their path; each is opened when it is first asked for."""

    def __init__(self) -> None:
        self._opened: dict[Path, Checkpoint] = {}

    def open(self, path: Path, subfolder: str = "") -> Checkpoint:
        """Open a checkpoint, see `open_checkpoint`, unless it has been opened before."""
        place = path / subfolder if os.path.isdir(path / subfolder) else path
        if place not in self._opened:
            self._opened[place] = open_checkpoint(path, subfolder)
        return self._opened[place]


@dataclass(frozen=True, eq=False)
class OpenPart(Generic[M]):
    """One network, ready to be loaded.

    Attributes:
        build: Makes it without memory.
        sources: How each of its tensors is made of a file's.
        patches: The changes of LoRA files to it.
    """

    build: Callable[[], M]
    sources: dict[str, TensorSource]
    patches: list[Patch]

    def load(self, device: torch.device | str, dtype: torch.dtype, keep_8bit: bool) -> M:
        """Load the network, see `load_into`, and apply the LoRA files."""
        module = self.build()
        load_into(module, self.sources, device, dtype, keep_8bit)
        apply_patches(module, self.patches, dtype)
        return module


class OpenModel:
    """The opened files of one model.

    Headers are read and names are matched when they are first needed, and only once.

    Args:
        spec: The model.
        files: Where its files are.
        opened: Those of its checkpoints that are open already.
    """

    def __init__(self, spec: ModelSpec, files: ModelFiles, opened: OpenFiles | None = None):
        self.spec, self.files = spec, files
        self._opened = opened or OpenFiles()
        self._tokenizers: dict[Part, PreTrainedTokenizerBase] = {}

    def checkpoint(self, part: Part) -> Checkpoint:
        """The opened checkpoint of a network.

        Raises:
            InputError: No complete weight file is there.
        """
        return self._opened.open(self.files.of(part), part)

    def check(self) -> None:
        """Check that all files are this model's. Reads headers only.

        Raises:
            InputError: A file is missing, broken, or another model's.
        """
        self.sources()
        for part in TOKENIZERS:
            self.tokenizer(part)
        self._warn_of_name()

    def _warn_of_name(self) -> None:
        """Warn of a file whose name says another of the two models that only the name can tell apart."""
        path = self.files.flow
        for sign, name, other in LOOK_ALIKE:
            if self.spec == configs[name] and re.search(sign, "/".join(path.parts[-2:]), re.IGNORECASE):
                warn(f"{path} loads as {name}, but its name says {other}: if so, give model {other}")

    def sources(self) -> dict[Part, dict[str, TensorSource]]:
        """How each tensor of each network is made of a file's.

        Raises:
            InputError: As `check`.
        """
        return {
            "transformer": self.transformer.sources,
            "vae": self.autoencoder.sources,
            "text_encoder": self.text_encoder("text_encoder").sources,
            "text_encoder_2": self.text_encoder("text_encoder_2").sources,
        }

    def ranks_beside(self) -> dict[Part, dict[str, int | None]]:
        """The rank beside each packed weight, by network and module, see `lora_patches.ranks_beside`.

        Raises:
            InputError: As `check`.
        """
        return {
            "transformer": ranks_beside(self.transformer.patches),
            "text_encoder": ranks_beside(self.text_encoder("text_encoder").patches),
            "text_encoder_2": ranks_beside(self.text_encoder("text_encoder_2").patches),
        }

    def fingerprint(self) -> str:
        """Identify the transformer that these files make, with its LoRAs. See `Checkpoint.fingerprint`."""
        own = self.checkpoint("transformer").fingerprint()
        added = [lora.fingerprint() for lora in self.transformer_loras]
        return hashlib.sha256("\n".join([own, *added]).encode()).hexdigest()[:32] if added else own

    # ---- the networks

    @cached_property
    def loras(self) -> list[LoraFile]:
        """The LoRA files that the user asked for."""
        return [read_lora(self._opened.open(use.path), use.strength, use.layers) for use in self.files.loras]

    @cached_property
    def transformer_loras(self) -> list[LoraFile]:
        """The LoRA files that change the transformer, the model's own first."""
        own = self.files.own_lora
        if own is None:
            return self.loras
        return [read_lora(self._opened.open(own.path), own.strength, own.layers), *self.loras]

    @cached_property
    def transformer(self) -> OpenPart[Flux]:
        """The transformer, with the guidance input of the file that it is read from.

        A file of fewer input channels gets zeros for the others, which a LoRA then changes.
        """
        base, channels = self.spec.base_params, self.spec.params.in_channels
        if self.files.own_lora is None or base is None:
            params = self.spec.params
            return self._open("transformer", lambda: on_meta(Flux, params), self.transformer_loras)
        sources = match_names(on_meta(Flux, base), self.checkpoint("transformer"), "transformer")
        if base.in_channels < channels:
            sources["img_in.weight"] = replace(sources["img_in.weight"], columns=channels)

        def build() -> Flux:
            return on_meta(Flux, replace(base, in_channels=channels))

        return OpenPart(build, sources, match_patches(self.transformer_loras, "transformer", build()))

    @cached_property
    def autoencoder(self) -> OpenPart[AutoEncoder]:
        """The autoencoder."""
        return self._open("vae", lambda: on_meta(AutoEncoder, self.spec.ae_params), [])

    def text_encoder(self, part: Part) -> "OpenPart[CLIPTextModel] | OpenPart[T5EncoderModel]":
        """The text encoder of that part, "text_encoder" (CLIP) or "text_encoder_2" (T5)."""
        return self._t5 if part == "text_encoder_2" else self._clip

    @cached_property
    def _t5(self) -> "OpenPart[T5EncoderModel]":
        from transformers import T5Config, T5EncoderModel

        folder, config = self._text_config("text_encoder_2")
        if not isinstance(config, T5Config):
            raise _wrong_encoder(folder, config, "text_encoder_2")
        return self._open("text_encoder_2", lambda: on_meta(T5EncoderModel, config), self.loras)

    @cached_property
    def _clip(self) -> "OpenPart[CLIPTextModel]":
        from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

        folder, config = self._text_config("text_encoder")
        # A CLIP checkpoint may have its vision half beside the text half.
        own = config.text_config if isinstance(config, CLIPConfig) else config
        if not isinstance(own, CLIPTextConfig):
            raise _wrong_encoder(folder, config, "text_encoder")
        return self._open("text_encoder", lambda: on_meta(CLIPTextModel, own), self.loras)

    def tokenizer(self, part: Part) -> "PreTrainedTokenizerBase":
        """The tokenizer of a text encoder."""
        if part not in self._tokenizers:
            embedding = self.text_encoder(part).sources[EMBEDDINGS[part]]
            name = TOKENIZERS[part]
            self._tokenizers[part] = load_tokenizer(self.files.text / name, name, embedding.shape[0])
        return self._tokenizers[part]

    def _open(self, part: Part, build: Callable[[], M], loras: list[LoraFile]) -> OpenPart[M]:
        module = build()
        sources = match_names(module, self.checkpoint(part), part)
        return OpenPart(build, sources, match_patches(loras, part, module))

    def _text_config(self, part: Part) -> "tuple[Path, PretrainedConfig]":
        """The folder of a text encoder's config.json, and what it says."""
        from transformers import AutoConfig

        path = self.files.of(part)
        folder = path / part if os.path.isdir(path / part) else path
        if not os.path.isfile(folder / "config.json"):
            folder = self.files.text / part
        if not os.path.isfile(folder / "config.json"):
            raise InputError(f"Got {folder}, which has no config.json: expected the folder of an encoder")
        read_json(folder / "config.json")  # transformers' own errors are less clear
        try:
            return folder, AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise InputError(f"Got {folder}, whose config.json is no encoder's: fetch it again") from error

    # ---- loading

    def load_transformer(
        self, device: torch.device | str, dtype: torch.dtype, keep_8bit: bool = False
    ) -> Flux:
        """Load the transformer, with all LoRA files in it or beside it.

        Args:
            device: Where it is put.
            dtype: What it computes in.
            keep_8bit: Whether matrices of 8-bit floats stay as they are stored and are expanded at each use.

        Raises:
            InputError: As `check`, for the transformer's files.
        """
        model = self.transformer.load(device, dtype, keep_8bit)
        if model.params.guidance_embed and not self.spec.params.guidance_embed:
            fold_guidance(model, self.spec)
        return model

    def load_autoencoder(self, device: torch.device | str, dtype: torch.dtype) -> AutoEncoder:
        """Load the autoencoder.

        Raises:
            InputError: As `check`, for the autoencoder's file.
        """
        return self.autoencoder.load(device, dtype, keep_8bit=False)

    def load_text_encoder(
        self,
        part: Part,
        device: torch.device | str,
        dtype: torch.dtype,
        keep_8bit: bool = False,
        max_length: int | None = None,
    ) -> HFEmbedder:
        """Load a text encoder and its tokenizer.

        Args:
            part: "text_encoder" (CLIP) or "text_encoder_2" (T5).
            device: Where it is put.
            dtype: What it computes in.
            keep_8bit: As for `load_transformer`.
            max_length: Tokens that a prompt is padded or cut to. If None, as the model's spec says.

        Raises:
            InputError: As `check`, for the encoder's files.
        """
        tokenizer = self.tokenizer(part)
        module = self.text_encoder(part).load(device, dtype, keep_8bit)
        if part == "text_encoder_2":
            module.set_input_embeddings(module.get_input_embeddings())  # T5 has one, in two places
        for name, buffer in module.named_buffers():
            # The only buffer of either encoder; files do not hold it.
            owner, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
            module.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
        length = self.spec.text_length if part == "text_encoder_2" else self.spec.clip_length
        return HFEmbedder.from_encoder(module, max_length or length, tokenizer)


def _wrong_encoder(folder: Path, config: "PretrainedConfig", part: Part) -> InputError:
    return InputError(f"Got {folder}, an encoder of kind {config.model_type}; expected {TITLES[part]}")
