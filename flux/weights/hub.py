"""What a model needs of the hub: its files, fetched once, or found where an earlier download left them.

The hub's own client does the talking, and its cache is where everything lies. Added here: a transfer that
was broken off goes on where it stopped, also in a later run; and what arrived is compared with the hub's
checksum before it takes its place.
"""

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flux.errors import InputError
from flux.specs import ModelSpec, get_spec

TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
ATTEMPTS, FIRST_WAIT = 6, 1.0  # without a byte of progress; seconds, doubled from one attempt to the next
TO_BE_REACHED = 3  # attempts at a hub that has never answered: as a rule, this machine is offline
PASSING = {408, 429, 500, 502, 503, 504}  # answers that another attempt may change
PIECE = 2**24


def own_file(spec: ModelSpec, filename: str, download: bool) -> Path:
    """A file of the model's repository or folder, downloaded if it must be and may be.

    Raises:
        InputError: it cannot be had; the message says what to do.
    """
    if spec.folder is not None:
        return spec.folder / filename
    return fetch(spec, [filename], download) / filename


def own_text_folder(spec: ModelSpec, download: bool, weights: bool = True) -> Path:
    """The folder that holds the model's `TEXT_FOLDERS`, downloaded if it must be and may be.

    Args:
        weights: the encoders' weights too, not only their configurations and the tokenizers.

    Raises:
        InputError: it cannot be had; the message says what to do.
    """
    if spec.folder is not None:
        return spec.folder
    return fetch(spec, TEXT_FOLDERS, download, weights)


def fetch(
    spec: ModelSpec, wanted: Sequence[str], download: bool = True, weights: bool = True, renew: bool = False
) -> Path:
    """The folder of a model's repository in the hub's cache, with these files and folders in it.

    What is there is used without a question to the network.

    Args:
        wanted: names of files, and of folders of which all is meant.
        weights: those inside the folders too.
        renew: compare with the hub even if everything seems to be there.

    Raises:
        InputError: something is not there and cannot be had; the message says what to do.
    """
    from huggingface_hub import constants

    here = _cached(spec, wanted, weights)
    if here is not None and not (renew and download and not constants.HF_HUB_OFFLINE):
        return here
    with _hub_errors(spec, " and ".join(wanted[:2]) + (" ..." if len(wanted) > 2 else "")):
        if not download or constants.HF_HUB_OFFLINE:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("offline")
        commit, parts = _listing(spec, wanted, weights)
        # What tells a whole folder from half of one comes last.
        parts.sort(key=lambda part: part.name.endswith("config.json"))
        _announce(spec, parts)
        for part in parts:
            _get(spec, part, commit)
    return Path(_repository(spec), "snapshots", commit)


@dataclass(frozen=True)
class Part:
    """A file of a repository: its size in bytes, and its SHA-256 (large files) or git's hash of it."""

    name: str
    size: int
    sha256: str | None
    git: str | None


def _repository(spec: ModelSpec) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=spec.repo_id, repo_type="model"))


def _cached(spec: ModelSpec, wanted: Sequence[str], weights: bool) -> Path | None:
    """The folder of the newest snapshot here, if all that is wanted is in it."""
    try:
        folder = _repository(spec) / "snapshots" / (_repository(spec) / "refs" / "main").read_text().strip()
    except OSError:
        return None
    for name in wanted:
        if name in TEXT_FOLDERS:
            patterns = ["*config.json", *["*.safetensors"] * (weights and "encoder" in name)]
            if not all(any((folder / name).glob(pattern)) for pattern in patterns):
                return None
        elif not (folder / name).is_file():
            return None
    return folder


def _listing(spec: ModelSpec, wanted: Sequence[str], weights: bool) -> tuple[str, list[Part]]:
    """The newest commit, and those of its files that are wanted."""
    from huggingface_hub import HfApi

    info = _patiently(
        lambda: HfApi().model_info(spec.repo_id, revision="main", files_metadata=True),
        to_be_reached=TO_BE_REACHED,
    )
    parts = []
    for file in info.siblings:
        folder = file.rfilename.partition("/")[0]
        inside = folder in wanted and (weights or not file.rfilename.endswith(".safetensors"))
        if inside or file.rfilename in wanted:
            sha256 = file.lfs.sha256 if file.lfs else None
            parts.append(Part(file.rfilename, file.size or 0, sha256, file.blob_id))
    found = {part.name for part in parts} | {part.name.partition("/")[0] for part in parts}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"Could not find {', '.join(missing)} in {spec.repo_id}: give paths of files instead"
        )
    return info.sha, parts


def _announce(spec: ModelSpec, parts: list[Part]) -> None:
    """Says what will be fetched, how much that is, and where it will lie.

    Raises:
        InputError: too little room on the disk.
    """
    blobs = _repository(spec) / "blobs"
    left = [part for part in parts if not (blobs / (part.sha256 or part.git or "-")).exists()]
    begun = sum(_size(_partial(spec, part)) for part in left if part.sha256)
    total = sum(part.size for part in left)
    if not left:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(blobs).free
    if total - begun > room:
        raise InputError(
            f"Got {room / 1e9:.1f} GB of room at {blobs}, expected {(total - begun) / 1e9:.1f} GB for "
            f"{spec.repo_id}: make room, or set HF_HOME to a folder on another disk"
        )
    so_far = f", of which {begun / 1e9:.2f} GB are here already" if begun else ""
    print(
        f"{spec.repo_id}: {len(left)} files, {total / 1e9:.2f} GB{so_far}, to {blobs.parent} ({spec.licence})"
    )


def _partial(spec: ModelSpec, part: Part) -> Path:
    return _repository(spec) / "blobs" / f"{part.sha256}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _get(spec: ModelSpec, part: Part, commit: str) -> None:
    """One file, into its place in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    blob = _repository(spec) / "blobs" / (part.sha256 or part.git or "-")
    if part.sha256 and not blob.exists():
        # One process at a time, for there is only one partial file. The hub's client keeps its locks there.
        locks = _repository(spec).parent / ".locks" / _repository(spec).name
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{part.sha256}.part.lock"):
            if not blob.exists():
                _transfer(spec, part, commit)
                os.replace(_partial(spec, part), blob)
    fresh = not blob.exists()
    path = Path(_patiently(lambda: hf_hub_download(spec.repo_id, part.name, revision=commit)))
    if fresh and part.git and part.size and _git_hash(path) != part.git:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise InputError(f"Got {part.name} of {spec.repo_id} damaged on the way: try again")
    reference = _repository(spec) / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def _transfer(spec: ModelSpec, part: Part, commit: str) -> None:
    """Brings the partial file to its full size, from where it stopped, and checks it."""
    path = _partial(spec, part)
    for last in (False, True):
        if _size(path) > part.size:
            path.unlink()
        _patiently(lambda: _continue(spec, part, commit, path), progress=lambda: _size(path))
        if _sha256(path) == part.sha256:
            return
        # What lay there from an earlier run may have been damaged: once more from the start.
        path.unlink()
        if last:
            raise InputError(
                f"Got {part.name} of {spec.repo_id} damaged on the way twice (its SHA-256 is not the hub's): "
                "try again later, or another HF_ENDPOINT"
            )


def _continue(spec: ModelSpec, part: Part, commit: str, path: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(spec.repo_id, part.name, revision=commit), build_hf_headers()
    # Asked anew each time: the address of a large file is signed, and good for a while only.
    location = get_hf_file_metadata(url).location
    if location.split("/")[2] != url.split("/")[2]:
        headers.pop("authorization", None)
    with path.open("ab") as file:
        http_get(
            location,
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=part.size,
            displayed_filename=part.name,
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _patiently(action: Callable, progress: Callable[[], int] = lambda: 0, to_be_reached: int = ATTEMPTS):
    """What `action` returns, tried again with growing pauses for as long as another attempt may help. Says so
    before each pause.

    Args:
        to_be_reached: after so many attempts without a connection it gives up.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return action()
        except Exception as error:
            failures = 0 if progress() > before else failures + 1
            name = type(error).__name__
            attempts = to_be_reached if name.startswith("Connect") else ATTEMPTS
            if failures == attempts or not _passes(error):
                raise
            pause = FIRST_WAIT * 2 ** min(failures, 5)
            print(f"The hub does not answer ({name}): trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)


def _passes(error: Exception) -> bool:
    """Whether it is of the network and may be over soon."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    # Which of its names the client of the hub speaks HTTP through depends on its version.
    return type(error).__module__.startswith("httpx") or "Consistency check failed" in str(error)


@contextmanager
def _hub_errors(spec: ModelSpec, what: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{spec.repo_id}"
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            reason = (
                f"access to it has to be asked for: accept its licence ({spec.licence}) at {page}, "
                "then log in with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            reason = f"there is no {page}, or it is not shown without a token: `hf auth login`, or HF_TOKEN"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = (
                "it is not on this machine, and the hub cannot be reached or HF_HUB_OFFLINE is set: "
                "go online, or give the files' paths"
            )
        elif status in PASSING:
            reason = f"it answers with status {status}: try again later; what has come so far is kept"
        elif _passes(error):
            reason = (
                f"it cannot be reached or breaks off ({type(error).__name__}): try again, it goes on where "
                "it stopped; or set HF_ENDPOINT to a mirror, or give the files' paths"
            )
        elif isinstance(error, OSError):
            reason = str(error).strip().splitlines()[0]
        else:
            raise
        raise InputError(f"Could not get {what} of {spec.repo_id} from the hub: {reason}") from error


def download(name: str) -> None:
    """Fetches all that a model needs of the hub, and says where it lies: `python -m flux download NAME`.

    Raises:
        InputError: an unknown model, or a download that fails.
    """
    spec = get_spec(name)
    if spec.folder is not None:
        print(f"{name} is part of this package: {spec.folder}")
        return
    names = [spec.repo_flow, spec.repo_ae, *TEXT_FOLDERS]
    folder = fetch(spec, names, renew=True)
    print(f"{name} is on this machine ({spec.licence}):")
    for path in (folder / name for name in names):
        print(f"  {path}")
