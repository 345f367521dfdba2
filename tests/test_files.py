"""Files are written whole or not at all, whoever writes them."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.images import noise

from flux.errors import InputError
from flux.files import LEAST_ROOM, check_folder, claim_folder, write_json, write_text
from flux.images.io import save_animation, save_image
from flux.scan.layers import scored_sets
from flux.scan.plots import plot_vitality

METADATA = {"prompt": "eine Straße in 東京", "steps": [1, 2.5, None], "nested": {"vital": [0, 1]}}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def full_disk(room: int):
    """Writing more than `room` bytes to a file fails half-way, as the operating system does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "a.png": lambda path: save_image(noise(96, 96), path, METADATA),
    "a.jpg": lambda path: save_image(noise(96, 96), path),
    "a.gif": lambda path: save_animation([noise(96, 96), noise(96, 96, 1)], path, 0.1),
    "a.svg": lambda path: plot_vitality(scored_sets({(0,): 0.5}, 1), path),
    "a.json": lambda path: write_json(path, list(range(5000))),
    "a.txt": lambda path: write_text(path, "word " * 5000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_keeps_the_older_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"older")
    with full_disk(4096), pytest.raises(InputError, match=rf"Cannot write .*{name}"):
        WRITERS[name](path)
    assert path.read_bytes() == b"older"
    assert names(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 4096
    assert names(tmp_path) == [name]


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("older")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "newer")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "older"


def test_unwritable_places_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(InputError, match=r"Cannot write .*another folder"):
            save_image(noise(), path)
    assert names(tmp_path) == ["file", "folder.png"]


def test_json_and_text(tmp_path):
    write_json(tmp_path / "a.json", METADATA)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == METADATA
    assert text.endswith("}\n")
    assert "東京" in text
    write_text(tmp_path / "a.txt", "zwölf\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()


def test_json_that_cannot_be_said_keeps_the_older_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "{}"


def test_folders_that_files_can_be_written_to(tmp_path):
    """A folder that is not there yet is not created by the check."""
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "file is a file"), ("file/below", "file is a file"), ("x" * 300 + "/a", "file name too long")],
)
def test_folders_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "file").touch(mode=0o777)  # with permission to execute, as a folder has it
    with pytest.raises(InputError, match=rf"Cannot write.*{reason}.* name another folder"):
        check_folder(tmp_path / name)


def test_folders_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(InputError, match="no permission in"):
        check_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("total", "free", "is_full"), [(2**40, 0, True), (2**40, LEAST_ROOM, False), (0, 0, False)]
)
def test_a_full_disk_is_found_first(tmp_path, monkeypatch, total, free, is_full):
    """A file system that tells no sizes is not full."""
    usage = shutil.disk_usage(tmp_path)._replace(total=total, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if is_full:
        with pytest.raises(InputError, match="the disk is full"):
            check_folder(tmp_path / "a")
    else:
        check_folder(tmp_path / "a")


ROOT = Path(__file__).parents[1]
CLAIM = """
import sys
from flux.files import claim_folder
claim_folder(sys.argv[1])
print("claimed", flush=True)
sys.stdin.read()
"""


def claiming(folder: Path, **more) -> subprocess.Popen:
    """A process that claims a folder, and holds it until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **more,
    )  # fmt: skip


def test_two_processes_never_write_to_one_folder(tmp_path):
    """The second one is refused, also under another name of the folder, until the first has ended."""
    folder, link = tmp_path / "a" / "out", tmp_path / "link"
    with claiming(folder) as first:
        assert first.stdout.readline() == "claimed\n"
        link.symlink_to(folder)
        for name in (folder, link, tmp_path / "a" / ".." / "a" / "out"):
            with pytest.raises(InputError, match="another run is writing to it"):
                claim_folder(name)
        claim_folder(tmp_path / "a" / "other")
        (folder / "000.png").touch()
        first.kill()  # not even then a lock stays behind
    claim_folder(folder)
    claim_folder(folder)  # it is this process's own
    assert names(folder) == ["000.png"]


def test_a_claimed_folder_that_stays_empty_is_removed(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with claiming(tmp_path / name) as process:
            process.stdout.readline()
            assert (tmp_path / name).is_dir()
    assert names(tmp_path) == ["old"]


def test_of_torchruns_processes_one_claims_for_all(tmp_path):
    launched = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    with claiming(tmp_path, env=launched | {"RANK": "0"}) as first:
        assert first.stdout.readline() == "claimed\n"
        with claiming(tmp_path, env=launched | {"RANK": "1"}) as second:
            assert second.stdout.readline() == "claimed\n"
