"""Find the files of a model: paths in settings, environment variables, the package itself, the hub."""

import os
from pathlib import Path

from flux.errors import InputError, warn
from flux.modules.image_embedders import adapter_features
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.weights.checkpoint import Checkpoint
from flux.weights.hub import TEXT_FOLDERS, own_file, own_text_folder
from flux.weights.identify import holds_part, require_part
from flux.weights.layouts import Part
from flux.weights.lora import read_lora
from flux.weights.open_model import TOKENIZERS, LoraUse, ModelFiles, OpenFiles, OpenModel, needs_lora
from flux.weights.tokenizers import check_tokenizer

ENV_TEXT = ("FLUX_TEXT_ENCODERS",)
"""Environment variables that name a local folder of both text encoders and their tokenizers."""


def find_model(settings: ModelSettings, download: bool = True) -> OpenModel:
    """Find the files that these settings name. What is not on this machine is downloaded.

    Each file is the one that the settings name, else the one that an environment variable names
    (`ModelSpec.env_flow`, `env_ae`, `env_lora`, `ENV_TEXT`), else the transformer's file or folder if that
    holds it too, else the package's own, one in upstream's folder `checkpoints`, or the hub's. All local
    files are checked before anything is downloaded.

    Args:
        settings: Which model, and paths of its files.
        download: Whether missing files may be downloaded.

    Raises:
        InputError: A path does not hold what it should, or a file cannot be downloaded.
    """
    spec, opened = get_spec(settings.model), OpenFiles()
    flow = _first(settings.weights, path_from_env(spec.env_flow))

    def in_flow(part: Part) -> Path | None:
        """The transformer's own path, if it holds this network too."""
        if flow is None:
            return None
        holds = (flow / part).is_dir() if flow.is_dir() else holds_part(opened.open(flow), part)
        return flow if holds else None

    ae = _first(settings.ae_weights, path_from_env(spec.env_ae)) or in_flow("vae")
    # The small models' text encoders are part of the package, as their autoencoder is.
    text = _first(settings.text_encoders, None if spec.folder else path_from_env(ENV_TEXT))
    t5, clip = map(_first, (settings.t5_weights, settings.clip_weights))
    if text is None:
        t5, clip = t5 or in_flow("text_encoder_2"), clip or in_flow("text_encoder")
        if flow is not None and all((flow / folder).is_dir() for folder in TEXT_FOLDERS):
            text = flow
    given: dict[Part, Path | None] = {
        "transformer": flow, "vae": ae, "text_encoder_2": t5, "text_encoder": clip,
    }  # fmt: skip
    for part, path in given.items():
        if path is not None:
            require_part(opened.open(path, part), part)
    loras = tuple(LoraUse(Path(lora.file), lora.weight, lora.layers) for lora in settings.lora)
    lora_path = _first(settings.lora_weights, path_from_env(spec.env_lora))
    for path in (*(lora.path for lora in loras), lora_path):
        if path is not None:
            read_lora(opened.open(path))
    if text is not None:
        _check_text_folder(text, given, opened)
    if isinstance(settings, ConditionSettings) and settings.redux:
        adapter_features(find_redux(spec, settings.redux_weights, download))
    flow = flow or own_file(spec, spec.repo_flow, download)
    scale = spec.lora_scale if settings.lora_scale is None else settings.lora_scale
    lora = own_lora(spec, opened.open(flow, "transformer"), lora_path, scale, download)
    if lora is None and spec.lora_filename and (settings.lora_weights or settings.lora_scale is not None):
        warn(f"{flow} is {settings.model} already: lora_weights and lora_scale change nothing")
    files = ModelFiles(
        flow,
        ae or own_file(spec, spec.repo_ae, download),
        text or own_text_folder(spec, download, weights=not (t5 and clip)),
        t5,
        clip,
        loras,
        lora,
    )
    return OpenModel(spec, files, opened)


def own_lora(
    spec: ModelSpec, transformer: Checkpoint, given: Path | None, scale: float, download: bool
) -> LoraUse | None:
    """Find the LoRA that turns a transformer's file into this model.

    Args:
        spec: The model.
        transformer: The opened file.
        given: The LoRA that the user names. If None, the model's own.
        scale: Its strength.
        download: Whether it may be downloaded.

    Returns:
        The LoRA. None if the model has none, or if the file has it merged in.

    Raises:
        InputError: It is not there and cannot be downloaded.
    """
    if spec.lora_filename is None or not needs_lora(spec, transformer):
        return None
    return LoraUse(given or own_file(spec, spec.lora_filename, download, spec.lora_repo_id), scale)


def find_redux(spec: ModelSpec, given: str | None = None, download: bool = True) -> Path:
    """Find the Redux adapter of a model.

    Args:
        spec: The model.
        given: The file that the user names. If None, the one of an environment variable, or the model's own.
        download: Whether it may be downloaded.

    Raises:
        InputError: The model has none, or it is not there and cannot be downloaded.
    """
    path = _first(given, path_from_env(spec.env_redux))
    if path is not None:
        return path
    if spec.redux_filename is None:
        raise InputError("Got an image for Redux, but this model has no Redux adapter: give flux-dev-redux")
    return own_file(spec, spec.redux_filename, download, spec.redux_repo_id)


def local_model(settings: ModelSettings) -> OpenModel | None:
    """Finds a model without downloads. Returns None if a file is not on this machine or not right."""
    try:
        return find_model(settings, download=False)
    except InputError:
        return None


def checkpoint_of(settings: ModelSettings) -> str | None:
    """The fingerprint of the transformer that these settings load, see `OpenModel.fingerprint`.

    Returns None if a file is not on this machine.
    """
    model = local_model(settings)
    return None if model is None else model.fingerprint()


def path_from_env(names: tuple[str, ...]) -> str | None:
    """The value of the first of these environment variables that is set."""
    return next((os.path.expanduser(os.environ[name]) for name in names if os.environ.get(name)), None)


def _first(*candidates: str | None) -> Path | None:
    return next((Path(path) for path in candidates if path), None)


def _check_text_folder(folder: Path, given: dict[Part, Path | None], opened: OpenFiles) -> None:
    missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")
    for part, tokenizer in TOKENIZERS.items():
        check_tokenizer(folder / tokenizer, tokenizer)
        if given[part] is None:
            require_part(opened.open(folder / part), part)
