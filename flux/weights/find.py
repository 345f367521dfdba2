"""Where the files of a model are: given paths, environment variables, the package, the hub."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.weights import lora
from flux.weights.checkpoint import fingerprint, open_checkpoint
from flux.weights.hub import TEXT_FOLDERS, own_file, own_text_folder
from flux.weights.layouts import holds, sources

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class ModelFiles:
    """Where one model's nets lie. Each path is a file, or a folder in diffusers' layout.

    Attributes:
        flow, ae: the transformer and the autoencoder.
        text: the folder that holds `TEXT_FOLDERS`; t5, clip: those encoders' weights, if they lie elsewhere.
        loras: files of differences with the strength of each.
    """

    flow: Path
    ae: Path
    text: Path
    t5: Path | None = None
    clip: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def of(self, part: str) -> Path:
        """Where that net lies, by the name of its folder in diffusers' layout."""
        own = {"transformer": self.flow, "vae": self.ae, "text_encoder": self.clip, "text_encoder_2": self.t5}
        return own[part] or self.text


def find_files(
    name: str,
    flow: str | None = None,
    ae: str | None = None,
    text: str | None = None,
    download: bool = True,
    t5: str | None = None,
    clip: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> ModelFiles:
    """The files of the model `name`; what is not on this machine is downloaded, with a progress bar.

    Each file is the one given here, else the one an environment variable names (`ModelSpec.env_flow`,
    `env_ae`), else the file of the transformer if that holds the other nets too, else the package's own or
    the hub's. All that is local is checked before anything is downloaded.

    Raises:
        InputError: a path that holds no such net, or a download that fails.
    """
    spec = get_spec(name)
    flow, ae = flow or path_from_env(spec.env_flow), ae or path_from_env(spec.env_ae)
    if flow and not ae and _has(Path(flow), "vae"):
        ae = flow
    if flow and not text:
        t5 = t5 or (flow if _has(Path(flow), "text_encoder_2") else None)
        clip = clip or (flow if _has(Path(flow), "text_encoder") else None)
        if all((Path(flow) / folder).is_dir() for folder in TEXT_FOLDERS):
            text = flow
    for path, part in ((flow, "transformer"), (ae, "vae"), (t5, "text_encoder_2"), (clip, "text_encoder")):
        if path:
            sources(open_checkpoint(Path(path), part), part, ())
    for path, _ in loras:
        lora.read_lora(Path(path))
    if text:
        _check_text_folder(Path(text), t5, clip)
    return ModelFiles(
        Path(flow) if flow else own_file(spec, spec.repo_flow, download),
        Path(ae) if ae else own_file(spec, spec.repo_ae, download),
        Path(text) if text else own_text_folder(spec, download, weights=not (t5 and clip)),
        Path(t5) if t5 else None,
        Path(clip) if clip else None,
        tuple((Path(path), weight) for path, weight in loras),
    )


def files_of(settings: ModelSettings, download: bool = True) -> ModelFiles:
    """The files that these settings name, as `find_files`."""
    return find_files(
        settings.model,
        settings.weights,
        settings.ae_weights,
        settings.text_encoders,
        download,
        settings.t5_weights,
        settings.clip_weights,
        [(entry.file, entry.weight) for entry in settings.lora],
    )


def path_from_env(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _has(path: Path, part: str) -> bool:
    return (path / part).is_dir() if path.is_dir() else holds(open_checkpoint(path), part)


def _check_text_folder(folder: Path, t5: str | None, clip: str | None) -> None:
    missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")
    for encoder, given in (("text_encoder", clip), ("text_encoder_2", t5)):
        if not given:
            sources(open_checkpoint(folder / encoder), encoder, ())


def checkpoint_of(settings: ModelSettings) -> str | None:
    """Fingerprint of the transformer that these settings load, with what is added to it; None if a file is
    not on this machine.
    """
    try:
        files = files_of(settings, download=False)
        own, loras = fingerprint(files.flow), all_loras(get_spec(settings.model), files)
        added = [f"{fingerprint(path, '')} {weight:g}" for path, weight in loras]
    except InputError:
        return None
    return hashlib.sha256("\n".join([own, *added]).encode()).hexdigest()[:32] if added else own


def all_loras(spec: ModelSpec, files: ModelFiles) -> tuple[tuple[Path, float], ...]:
    """The differences to add to the file of the transformer: the model's own first, then those asked for."""
    if own_lora(spec, files.flow) is None:
        return files.loras
    return ((own_file(spec, spec.lora, True), 1.0), *files.loras)


def own_lora(spec: ModelSpec, flow: Path) -> str | None:
    """The difference that makes the model of another one's file; None if the file is the model itself."""
    if spec.lora is None:
        return None
    made, _ = sources(open_checkpoint(flow, "transformer"), "transformer", ["guidance_in.in_layer.weight"])
    return spec.lora if made else None
