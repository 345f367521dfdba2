"""Files from the Hugging Face hub: downloaded once, or found in the cache of an earlier download."""

from pathlib import Path

from flux.errors import InputError
from flux.modules.image_embedders import DEPTH_MODEL, SIGLIP
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.repository import TEXT_FOLDERS, Repository

IMAGE_ENCODERS = {"depth": DEPTH_MODEL, "redux": SIGLIP}
"""The models that make conditions of images, by the map or the condition. Their licence is Apache-2.0."""
IMAGE_ENCODER_FILES = ("preprocessor_config.json", "model.safetensors", "config.json")
CHECKPOINTS_DIR = Path("checkpoints")
"""The folder, in the current one, into which upstream's package downloads: a folder for each repository."""


def own_file(spec: ModelSpec, filename: str, download: bool, repo_id: str | None = None) -> Path:
    """Find a file of a model in the package, upstream's folder or the hub's cache; download it if allowed.

    Args:
        spec: The model.
        filename: Name of the file in the model's repository or folder. If empty, only the user can name it.
        download: Whether it may be downloaded.
        repo_id: The repository that has it. If None, the model's.

    Raises:
        InputError: The file is not there and cannot be downloaded. The message says what to do.
    """
    if not filename:
        raise InputError(
            "Got no file of the transformer, and there are several for this model: download one, and give "
            f"its path as weights or in {spec.env_flow[0]}"
        )
    repo_id = repo_id or spec.repo_id
    if spec.folder is not None or repo_id is None:
        return (spec.folder or Path()) / filename
    path = CHECKPOINTS_DIR / repo_id.replace("/", "_") / filename
    if path.is_file():
        return path
    return Repository(repo_id, spec.licence).fetch([filename], download) / filename


def own_text_folder(spec: ModelSpec, download: bool, weights: bool = True) -> Path:
    """Find the folder that holds a model's `TEXT_FOLDERS`; download it if allowed.

    All published models have the same: those in the cache of any model are taken.

    Args:
        spec: The model.
        download: Whether it may be downloaded.
        weights: Whether the encoders' weights are needed, beside their configurations and the tokenizers.

    Raises:
        InputError: A file is not there and cannot be downloaded. The message says what to do.
    """
    if spec.folder is not None or spec.repo_id is None:
        return spec.folder or Path()
    for name in dict.fromkeys([spec.repo_id, *(other.repo_id for other in configs.values())]):
        if name and (folder := Repository(name, spec.licence).cached(TEXT_FOLDERS, weights)):
            return folder
    return Repository(spec.repo_id, spec.licence).fetch(TEXT_FOLDERS, download, weights)


# ---- the command


def download(name: str) -> None:
    """Download all files of a model and print where they are: `python -m flux download NAME`.

    Those are also the files of the model that makes its condition of an image.

    Raises:
        InputError: The model is unknown, or a download fails.
    """
    spec = get_spec(name)
    if spec.folder is not None or spec.repo_id is None:
        print(f"{name} is part of this package: {spec.folder}")
        return
    wanted = [(spec.repo_id, [name for name in (spec.repo_flow, spec.repo_ae, *TEXT_FOLDERS) if name])]
    if spec.lora_filename:
        wanted.append((spec.lora_repo_id or spec.repo_id, [spec.lora_filename]))
    if spec.condition == "redux" and spec.redux_filename:
        wanted.append((spec.redux_repo_id or spec.repo_id, [spec.redux_filename]))
    paths = []
    for repo_id, names in wanted:
        folder = Repository(repo_id, spec.licence).fetch(names, renew=True)
        paths += [folder / name for name in names]
    if encoder := IMAGE_ENCODERS.get(spec.control or spec.condition or ""):
        paths.append(Repository(encoder, "Apache-2.0").fetch(IMAGE_ENCODER_FILES, renew=True))
    print(f"{name} is on this machine ({spec.licence}):")
    for path in paths:
        print(f"  {path}")
    if not spec.repo_flow:
        print(f"its transformer is a file of yours: give its path as weights or in {spec.env_flow[0]}")
