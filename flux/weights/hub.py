"""Files from the Hugging Face hub: downloaded once, or found in the cache of an earlier download.

The hub's own client makes the requests, and files are put into its cache. What it does not do is added here:
an interrupted transfer is resumed, also in a later run, and what arrived is compared with the hub's checksum
before it is put in place. Hence neither `snapshot_download(dry_run=True)`, which tells no checksums, nor
`http_backoff`, which does not know how far a transfer came, is used.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flux.errors import InputError
from flux.modules.image_embedders import DEPTH_MODEL, SIGLIP
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.checkpoint import read_weight_map
from flux.weights.hub_errors import hub_errors, with_retries
from flux.weights.tokenizers import VOCABULARIES, vocabulary_files

TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
IMAGE_ENCODERS = {"depth": DEPTH_MODEL, "redux": SIGLIP}
"""The models that make conditions of images, by the map or the condition. Their licence is Apache-2.0."""
IMAGE_ENCODER_FILES = ("preprocessor_config.json", "model.safetensors", "config.json")
CONNECT_ATTEMPTS = 3  # without a connection: usually this machine is offline
HASH_BYTES = 2**24  # read at once
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
    return path if path.is_file() else fetch(spec, [filename], download, repo_id=repo_id) / filename


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
    if spec.folder is not None:
        return spec.folder
    return _cached_text_folder(spec, weights) or fetch(spec, TEXT_FOLDERS, download, weights)


def _cached_text_folder(spec: ModelSpec, weights: bool) -> Path | None:
    """The newest cached snapshot with all `TEXT_FOLDERS`, of this model's repository or of any other's."""
    repositories = dict.fromkeys([spec.repo_id, *(other.repo_id for other in configs.values())])
    found = (_Repository.of(spec, name).cached(TEXT_FOLDERS, weights) for name in repositories if name)
    return next((folder for folder in found if folder is not None), None)


def fetch(
    spec: ModelSpec,
    wanted: Sequence[str],
    download: bool = True,
    weights: bool = True,
    renew: bool = False,
    repo_id: str | None = None,
) -> Path:
    """Find or download files of a model's repository. What is cached is used without asking the network.

    Args:
        spec: The model.
        wanted: Names of files, and of folders that are needed whole.
        download: Whether files may be downloaded.
        weights: Whether weights inside the folders are needed too.
        renew: Whether to compare with the hub even if everything is cached.
        repo_id: The repository. If None, the model's, which must then have one.

    Returns:
        The snapshot in the hub's cache that holds the files.

    Raises:
        InputError: A file is not there and cannot be downloaded. The message says what to do.
    """
    from huggingface_hub import constants

    repository = _Repository.of(spec, repo_id)
    cached = repository.cached(wanted, weights)
    if cached is not None and not (renew and download and not constants.HF_HUB_OFFLINE):
        return cached
    named = " and ".join(wanted[:2]) + (" ..." if len(wanted) > 2 else "")
    with hub_errors(repository.id, repository.licence, named):
        if not download or constants.HF_HUB_OFFLINE:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("offline")
        if str(repository.folder).startswith("~"):
            raise InputError(
                f"Got no home folder for the cache of {repository.id}: set HF_HOME to a folder that can be "
                "written, or give the files' paths"
            )
        commit, files = repository.list_files(wanted, weights)
        # `cached` takes a folder of shards with its config.json and no index for complete: these come last.
        files.sort(key=lambda file: file.name.endswith("config.json"))
        repository.announce(files)
        for file in files:
            repository.download(file, commit)
    return repository.folder / "snapshots" / commit


@dataclass(frozen=True)
class _RemoteFile:
    """A file of a repository.

    Attributes:
        name: Its path in the repository.
        size: Its bytes.
        sha256: Its SHA-256; None for small files.
        git_hash: Git's hash of it.
    """

    name: str
    size: int
    sha256: str | None
    git_hash: str | None


@dataclass(frozen=True)
class _Repository:
    """A model's repository on the hub.

    Attributes:
        id: Its name, "owner/name".
        licence: The licence of a download.
        folder: Its folder in the hub's cache.
    """

    id: str
    licence: str
    folder: Path

    @classmethod
    def of(cls, spec: ModelSpec, repo_id: str | None = None) -> "_Repository":
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repo_id = repo_id or spec.repo_id
        if repo_id is None:
            raise ValueError("This model has no repository: its files are part of the package")
        folder = repo_folder_name(repo_id=repo_id, repo_type="model")
        return cls(repo_id, spec.licence, Path(constants.HF_HUB_CACHE, folder))

    def blob(self, file: _RemoteFile) -> Path:
        """Where the cache keeps the content of a file."""
        return self.folder / "blobs" / (file.sha256 or file.git_hash or "-")

    def partial(self, file: _RemoteFile) -> Path:
        """Where a large file is kept until it is complete."""
        return self.folder / "blobs" / f"{file.sha256}.part"

    def cached(self, wanted: Sequence[str], weights: bool) -> Path | None:
        """The newest cached snapshot, if it holds all that is wanted."""
        try:
            snapshot = self.folder / "snapshots" / (self.folder / "refs" / "main").read_text().strip()
        except OSError:
            return None
        for name in wanted:
            if name in TEXT_FOLDERS:
                if not _is_whole(snapshot / name, weights):
                    return None
            elif not (snapshot / name).is_file():
                return None
        return snapshot

    def list_files(self, wanted: Sequence[str], weights: bool) -> tuple[str, list[_RemoteFile]]:
        """Ask the hub for the newest commit and those of its files that are wanted."""
        from huggingface_hub import HfApi

        info = with_retries(
            lambda: HfApi().model_info(self.id, revision="main", files_metadata=True),
            connect_attempts=CONNECT_ATTEMPTS,
        )
        files = []
        for file in info.siblings or ():
            folder = file.rfilename.partition("/")[0]
            inside = folder in wanted and (weights or not file.rfilename.endswith(".safetensors"))
            if inside or file.rfilename in wanted:
                sha256 = file.lfs.sha256 if file.lfs else None
                files.append(_RemoteFile(file.rfilename, file.size or 0, sha256, file.blob_id))
        found = {file.name for file in files} | {file.name.partition("/")[0] for file in files}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(f"Could not find {', '.join(missing)} in {self.id}: give paths of files instead")
        return info.sha or "main", files

    def announce(self, files: Sequence[_RemoteFile]) -> None:
        """Print the files to download, their total size and the destination.

        Raises:
            InputError: There is too little room on the disk.
        """
        left = [file for file in files if not self.blob(file).exists()]
        if not left:
            return
        begun = sum(_size(self.partial(file)) for file in left if file.sha256)
        total = sum(file.size for file in left)
        blobs = self.folder / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(blobs).free
        if total - begun > room:
            raise InputError(
                f"Got {room / 1e9:.1f} GB of room at {blobs}, expected {(total - begun) / 1e9:.1f} GB for "
                f"{self.id}: make room, or set HF_HOME to a folder on another disk"
            )
        so_far = f", of which {begun / 1e9:.2f} GB are here already" if begun else ""
        print(
            f"{self.id}: {len(left)} files, {total / 1e9:.2f} GB{so_far}, to {self.folder} ({self.licence})"
        )

    def download(self, file: _RemoteFile, commit: str) -> None:
        """Download one file into its place in the cache, unless it is there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import WeakFileLock

        blob = self.blob(file)
        if file.sha256 and not blob.exists():
            # One process at a time, since there is one partial file. The hub's client keeps its locks there.
            locks = self.folder.parent / ".locks" / self.folder.name
            locks.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(locks / f"{file.sha256}.part.lock"):
                if not blob.exists():
                    self._transfer(file, commit)
                    os.replace(self.partial(file), blob)
        fresh = not blob.exists()
        path = Path(with_retries(lambda: hf_hub_download(self.id, file.name, revision=commit)))
        if fresh and file.git_hash and file.size and _git_hash(path) != file.git_hash:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise InputError(f"Got {file.name} of {self.id} damaged on the way: try again")
        reference = self.folder / "refs" / "main"
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)

    def _transfer(self, file: _RemoteFile, commit: str) -> None:
        """Complete the partial file, from where it stopped, and check it."""
        path = self.partial(file)
        for last in (False, True):
            if _size(path) > file.size:
                path.unlink()
            with_retries(lambda: self._resume(file, commit), progress=lambda: _size(path))
            if _sha256(path) == file.sha256:
                return
            # What an earlier run left may have been damaged: try once more from the start.
            path.unlink()
            if last:
                raise InputError(
                    f"Got {file.name} of {self.id} damaged on the way twice (its SHA-256 is not the hub's): "
                    "try again later, or another HF_ENDPOINT"
                )

    def _resume(self, file: _RemoteFile, commit: str) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url, headers = hf_hub_url(self.id, file.name, revision=commit), build_hf_headers()
        # Asked at each attempt: the address of a large file is signed and expires.
        location = get_hf_file_metadata(url).location
        if location.split("/")[2] != url.split("/")[2]:
            headers.pop("authorization", None)
        with self.partial(file).open("ab") as partial:
            http_get(
                location,
                partial,
                resume_size=partial.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.name,
            )


def _is_whole(folder: Path, weights: bool) -> bool:
    """Whether a cached text folder has all its files."""
    if folder.name in VOCABULARIES:
        has_config = (folder / "tokenizer_config.json").is_file()
        return has_config and bool(vocabulary_files(folder, folder.name))
    if not (folder / "config.json").is_file():
        return False
    shards = {
        file for index in folder.glob("*.safetensors.index.json") for file in read_weight_map(index).values()
    }
    if not weights or shards:
        return not weights or all((folder / file).is_file() for file in shards)
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- the command


def download(name: str) -> None:
    """Download all files of a model and print where they are: `python -m flux download NAME`.

    Those are also the files of the model that makes its condition of an image.

    Raises:
        InputError: The model is unknown, or a download fails.
    """
    spec = get_spec(name)
    if spec.folder is not None:
        print(f"{name} is part of this package: {spec.folder}")
        return
    repositories = {spec.repo_id: [name for name in (spec.repo_flow, spec.repo_ae, *TEXT_FOLDERS) if name]}
    if spec.lora_filename:
        repositories[spec.lora_repo_id] = [spec.lora_filename]
    if spec.condition == "redux" and spec.redux_filename:
        repositories[spec.redux_repo_id] = [spec.redux_filename]
    paths = []
    for repo_id, names in repositories.items():
        folder = fetch(spec, names, renew=True, repo_id=repo_id)
        paths += [folder / name for name in names]
    if encoder := IMAGE_ENCODERS.get(spec.control or spec.condition or ""):
        own = replace(spec, repo_id=encoder, licence="Apache-2.0")
        paths.append(fetch(own, IMAGE_ENCODER_FILES, renew=True))
    print(f"{name} is on this machine ({spec.licence}):")
    for path in paths:
        print(f"  {path}")
    if not spec.repo_flow:
        print(f"its transformer is a file of yours: give its path as weights or in {spec.env_flow[0]}")
