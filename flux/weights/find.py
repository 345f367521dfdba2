"""Find the files of a model: paths in settings, environment variables, the package itself, the hub."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flux.errors import InputError, warn
from flux.model import Flux, FluxParams
from flux.modules.image_embedders import CannyImageEncoder, check_source
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.weights.checkpoint import Checkpoint, open_checkpoint
from flux.weights.hub import IMAGE_ENCODER_FILES, IMAGE_ENCODERS, TEXT_FOLDERS, own_file, own_text_folder
from flux.weights.identify import describe_checkpoint, holds_part, require_part
from flux.weights.layouts import Part
from flux.weights.load import match_names, on_meta
from flux.weights.lora import read_lora
from flux.weights.open_model import TOKENIZERS, LoraUse, ModelFiles, OpenFiles, OpenModel
from flux.weights.repository import Repository
from flux.weights.sources import find_sources
from flux.weights.tokenizers import check_tokenizer

ENV_TEXT = ("FLUX_TEXT_ENCODERS",)
"""Environment variables that name a local folder of both text encoders and their tokenizers."""


def find_model(settings: ModelSettings, download: bool = True) -> OpenModel:
    """Find the files that these settings name. What is not on this machine is downloaded.

    Each file is the one that the settings name, else the one that an environment variable names
    (`ModelSpec.env_flow`, `env_ae`, `env_lora`, `ENV_TEXT`), else the transformer's file or folder if that
    holds it too, else the package's own, one in upstream's folder `checkpoints`, or the hub's. All named
    files are checked before anything is downloaded.

    Args:
        settings: Which model, and paths of its files.
        download: Whether missing files may be downloaded.

    Raises:
        InputError: A path does not hold what it should, or a file cannot be downloaded.
    """
    spec, opened = get_spec(settings.model), OpenFiles()
    named, text = _named_files(settings, spec, opened)
    loras = tuple(LoraUse(Path(lora.file), lora.weight, lora.layers) for lora in settings.lora)
    lora_weights = _named(settings.lora_weights, spec.env_lora)
    _check_named(named, text, [*(lora.path for lora in loras), *filter(None, [lora_weights])], opened)
    image_encoders = _check_image_encoders(settings, spec, download)

    flow = named.get("transformer") or own_file(spec, spec.repo_flow, download)
    scale = spec.lora_scale if settings.lora_scale is None else settings.lora_scale
    lora = own_lora(spec, opened.open(flow, "transformer"), lora_weights, scale, download)
    if lora is None and spec.lora_filename and (settings.lora_weights or settings.lora_scale is not None):
        warn(f"{flow} is {settings.model} already: lora_weights and lora_scale change nothing")
    if spec.folder is None and "transformer" in named and not (text and "vae" in named):
        # Names and shapes tell another model's file before gigabytes are fetched to go with it.
        params = spec.params if lora is None or spec.base_params is None else spec.base_params
        match_names(on_meta(Flux, params), opened.open(flow, "transformer"), "transformer")
    t5, clip = named.get("text_encoder_2"), named.get("text_encoder")
    files = ModelFiles(
        flow,
        ae=named.get("vae") or own_file(spec, spec.repo_ae, download),
        text=text or own_text_folder(spec, download, weights=not (t5 and clip)),
        t5=t5,
        clip=clip,
        loras=loras,
        own_lora=lora,
    )
    # Last: the hub gives them without a login, where the others may be refused.
    for repo_id in image_encoders:
        Repository(repo_id, "Apache-2.0").fetch(IMAGE_ENCODER_FILES, download)
    return OpenModel(spec, files, opened)


def _named_files(
    settings: ModelSettings, spec: ModelSpec, opened: OpenFiles
) -> tuple[dict[Part, Path], Path | None]:
    """The files that the user names for each network, and the folder of text encoders and tokenizers.

    What has no name of its own, but is in the transformer's file or folder, is taken from there.
    """
    flow = _named(settings.weights, spec.env_flow)
    # The small models' text encoders are part of the package, as their autoencoder is.
    text = _named(settings.text_encoders, () if spec.folder else ENV_TEXT)
    paths: dict[Part, Path | None] = {
        "transformer": flow,
        "vae": _named(settings.ae_weights, spec.env_ae),
        "text_encoder_2": _named(settings.t5_weights),
        "text_encoder": _named(settings.clip_weights),
    }
    if flow is not None:
        beside: tuple[Part, ...] = ("vae",) if text else ("vae", "text_encoder_2", "text_encoder")
        for part in beside:
            if paths[part] is None and _holds(flow, part, opened):
                paths[part] = flow
        if text is None and all(os.path.isdir(flow / folder) for folder in TEXT_FOLDERS):
            text = flow
    return {part: path for part, path in paths.items() if path is not None}, text


def _holds(path: Path, part: Part, opened: OpenFiles) -> bool:
    """Whether a folder has a subfolder for this network, or a file holds it."""
    return os.path.isdir(path / part) if os.path.isdir(path) else holds_part(opened.open(path), part)


def _check_named(
    named: Mapping[Part, Path], text: Path | None, loras: Sequence[Path], opened: OpenFiles
) -> None:
    """Check that each named path holds what it should, by names in the files' headers.

    Raises:
        InputError: One does not. The message says what it holds.
    """
    for part, path in named.items():
        require_part(opened.open(path, part), part)
    for path in loras:
        read_lora(opened.open(path))
    if text is not None:
        _check_text_folder(text, named, opened)


def _check_text_folder(folder: Path, named: Mapping[Part, Path], opened: OpenFiles) -> None:
    """Check a folder of text encoders, apart from encoders whose files have names of their own.

    Raises:
        InputError: It does not hold them and their tokenizers.
    """
    if not os.path.isdir(folder):
        is_file = os.path.isfile(folder)
        what = describe_checkpoint(opened.open(folder)) if is_file else "no folder that can be read"
        raise InputError(
            f"Got {folder} for the text encoders, which is {what}; expected a folder with "
            f"{', '.join(TEXT_FOLDERS)}"
        )
    missing = [name for name in TEXT_FOLDERS if not os.path.isdir(folder / name)]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")
    for part, tokenizer in TOKENIZERS.items():
        check_tokenizer(folder / tokenizer, tokenizer)
        if part not in named:
            require_part(opened.open(folder / part), part)


# ---- the LoRA and the adapter of a model


def own_lora(
    spec: ModelSpec, transformer: Checkpoint, given: Path | None, scale: float, download: bool
) -> LoraUse | None:
    """Find the LoRA that turns a transformer's file into this model.

    The file's inputs tell whether it is the model to turn, or has the LoRA merged in. Where both have the
    same inputs, it is taken for the former.

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
    if spec.lora_filename is None or spec.base_params is None:
        return None
    before, after = _inputs_of(spec.base_params), _inputs_of(spec.params)
    if before != after == _inputs_in(transformer):
        return None
    return LoraUse(given or own_file(spec, spec.lora_filename, download, spec.lora_repo_id), scale)


def _inputs_of(params: FluxParams) -> tuple[int | None, bool]:
    """The channels of an image token, and whether there is a guidance input."""
    return params.in_channels, params.guidance_embed


def _inputs_in(transformer: Checkpoint) -> tuple[int | None, bool]:
    """The same, of an opened file. There are no channels if it has no such matrix."""
    image, guidance = "img_in.weight", "guidance_in.in_layer.weight"
    sources, _ = find_sources(transformer, "transformer", [image, guidance])
    channels = sources[image].shape[-1:] if image in sources else ()
    return next(iter(channels), None), guidance in sources


def find_redux(spec: ModelSpec, given: str | None = None, download: bool = True) -> Path:
    """Find the Redux adapter of a model.

    Args:
        spec: The model.
        given: The file that the user names. If None, the one of an environment variable, or the model's own.
        download: Whether it may be downloaded.

    Raises:
        InputError: The model has none, or it is not there and cannot be downloaded.
    """
    path = _named(given, spec.env_redux)
    if path is not None:
        return path
    if spec.redux_filename is None:
        raise InputError("Got an image for Redux, but this model has no Redux adapter: give flux-dev-redux")
    return own_file(spec, spec.redux_filename, download, spec.redux_repo_id)


def _check_image_encoders(settings: ModelSettings, spec: ModelSpec, download: bool) -> list[str]:
    """Check the models that make the condition of the settings' images. They are loaded for that alone.

    Returns:
        Those that are still to be fetched, by their hub ids.

    Raises:
        InputError: One is not there, or is another model; or OpenCV, which finds edges, is not installed.
    """
    if not isinstance(settings, ConditionSettings):
        return []
    sources = {}
    if settings.redux:
        redux_features(find_redux(spec, settings.redux_weights, download))
        sources["SigLIP"] = settings.siglip
    if settings.control and spec.control == "depth":
        sources["depth model"] = settings.depth_model
    if settings.control and spec.control == "canny":
        CannyImageEncoder("cpu")
    published = IMAGE_ENCODERS.values()
    for name, source in sources.items():
        if source not in published:
            check_source(name, source)
    return [source for source in sources.values() if source in published]


def redux_features(path: Path) -> int:
    """The number of SigLIP's features that a Redux adapter takes.

    Raises:
        InputError: The file is no adapter.
    """
    adapter = open_checkpoint(path)
    up = adapter.tensors.get("redux_up.weight")
    if up is None or len(up.shape) != 2:
        raise InputError(f"Got {path}, which is {describe_checkpoint(adapter)}; expected a Redux adapter")
    return up.shape[1]


# ---- a model that is on this machine


def local_model(settings: ModelSettings) -> OpenModel | None:
    """Find a model without downloads. Returns None if a file is not on this machine or not right."""
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


# ---- paths


def path_from_env(names: tuple[str, ...]) -> Path | None:
    """The path in the first of these environment variables that is set.

    Raises:
        InputError: Nothing is there.
    """
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return None
    path = Path(os.path.expanduser(os.environ[name]))
    if not os.path.exists(path):
        raise InputError(f"Got {path} in {name}, which does not exist: mend or unset the variable")
    return path


def _named(path: str | None, variables: tuple[str, ...] = ()) -> Path | None:
    """The path that the user names: in the settings, else in the first of these variables that is set."""
    return Path(path) if path else path_from_env(variables)
