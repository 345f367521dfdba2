"""One repository of the Hugging Face hub: its files in the hub's cache, and the download of missing ones.

The hub's own client makes the requests, and files are put into its cache. What it does not do is added here:
an interrupted transfer is resumed, also in a later run, and what arrived is compared with the hub's checksum
before it is put in place. Hence neither `snapshot_download(dry_run=True)`, which tells no checksums, nor
`http_backoff`, which does not know how far a transfer came, is used.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux.errors import InputError
from flux.weights.checkpoint import read_weight_map
from flux.weights.hub_errors import hub_errors, with_retries
from flux.weights.tokenizers import VOCABULARIES, vocabulary_files

TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
CONNECT_ATTEMPTS = 3  # without a connection: usually this machine is offline
HASH_BYTES = 2**24  # read at once


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it.

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
class Repository:
    """A model's repository on the hub, and its folder in the hub's cache.

    Attributes:
        id: Its name, "owner/name".
        licence: The licence of a download.
    """

    id: str
    licence: str

    @property
    def folder(self) -> Path:
        """Its folder in the hub's cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.id, repo_type="model"))

    def fetch(
        self, wanted: Sequence[str], download: bool = True, weights: bool = True, renew: bool = False
    ) -> Path:
        """Find or download files. What is cached is used without asking the network.

        Args:
            wanted: Names of files, and of folders that are needed whole.
            download: Whether files may be downloaded.
            weights: Whether weights inside the folders are needed too.
            renew: Whether to compare with the hub even if everything is cached.

        Returns:
            The snapshot in the hub's cache that holds the files.

        Raises:
            InputError: A file is not there and cannot be downloaded. The message says what to do.
        """
        from huggingface_hub import constants

        online = download and not constants.HF_HUB_OFFLINE
        cached = self.cached(wanted, weights)
        if cached is not None and not (renew and online):
            return cached
        named = " and ".join(wanted[:2]) + (" ..." if len(wanted) > 2 else "")
        with hub_errors(self.id, self.licence, named):
            if not online:
                from huggingface_hub.errors import LocalEntryNotFoundError

                raise LocalEntryNotFoundError("offline")
            return self._download_all(wanted, weights)

    def _download_all(self, wanted: Sequence[str], weights: bool) -> Path:
        """Download what is wanted and not cached, and return the snapshot that holds it."""
        if str(self.folder).startswith("~"):
            raise InputError(
                f"Got no home folder for the cache of {self.id}: set HF_HOME to a folder that can be "
                "written, or give the files' paths"
            )
        commit, files = self._list_files(wanted, weights)
        # `cached` takes a folder of shards with its config.json and no index for complete: these come last.
        files.sort(key=lambda file: file.name.endswith("config.json"))
        self._announce(files)
        for file in files:
            self._download(file, commit)
        return self.folder / "snapshots" / commit

    def _blob(self, file: RemoteFile) -> Path:
        """Where the cache keeps the content of a file."""
        return self.folder / "blobs" / (file.sha256 or file.git_hash or "-")

    def _partial(self, file: RemoteFile) -> Path:
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

    def _list_files(self, wanted: Sequence[str], weights: bool) -> tuple[str, list[RemoteFile]]:
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
                files.append(RemoteFile(file.rfilename, file.size or 0, sha256, file.blob_id))
        found = {file.name for file in files} | {file.name.partition("/")[0] for file in files}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise InputError(f"Could not find {', '.join(missing)} in {self.id}: give paths of files instead")
        return info.sha or "main", files

    def _announce(self, files: Sequence[RemoteFile]) -> None:
        """Print the files to download, their total size and the destination.

        Raises:
            InputError: There is too little room on the disk.
        """
        left = [file for file in files if not self._blob(file).exists()]
        if not left:
            return
        begun = sum(_size(self._partial(file)) for file in left if file.sha256)
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

    def _download(self, file: RemoteFile, commit: str) -> None:
        """Download one file into its place in the cache, unless it is there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import WeakFileLock

        blob = self._blob(file)
        if file.sha256 and not blob.exists():
            # One process at a time, since there is one partial file. The hub's client keeps its locks there.
            locks = self.folder.parent / ".locks" / self.folder.name
            locks.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(locks / f"{file.sha256}.part.lock"):
                if not blob.exists():
                    self._transfer(file, commit)
                    os.replace(self._partial(file), blob)
        fresh = not blob.exists()
        path = Path(with_retries(lambda: hf_hub_download(self.id, file.name, revision=commit)))
        if fresh and file.git_hash and file.size and _git_hash(path) != file.git_hash:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise InputError(f"Got {file.name} of {self.id} damaged on the way: try again")
        reference = self.folder / "refs" / "main"
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)

    def _transfer(self, file: RemoteFile, commit: str) -> None:
        """Complete the partial file, from where it stopped, and check it."""
        path = self._partial(file)
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

    def _resume(self, file: RemoteFile, commit: str) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url, headers = hf_hub_url(self.id, file.name, revision=commit), build_hf_headers()
        # Asked at each attempt: the address of a large file is signed and expires.
        location = get_hf_file_metadata(url).location
        if location.split("/")[2] != url.split("/")[2]:
            headers.pop("authorization", None)
        with self._partial(file).open("ab") as partial:
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
