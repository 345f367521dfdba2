"""Files of models from the hub: fetched once, found in a cache, never asked for offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub_server import FILES, FLOW, SPEC, own_flow
from huggingface_hub import constants

from flux import cli
from flux.errors import InputError
from flux.weights.hub import TEXT_FOLDERS, own_text_folder
from flux.weights.repository import Repository

ROOT = Path(__file__).parents[2]


# ---- what goes well


def test_a_file_is_fetched_once(server, capsys):
    path = own_flow()
    assert path.read_bytes() == FLOW
    assert path.is_relative_to(constants.HF_HUB_CACHE)
    said = capsys.readouterr().out
    assert "1 files, 0.00 GB" in said
    assert SPEC.licence in said
    assert SPEC.repo_id in said
    server.asked.clear()
    assert own_flow() == path
    assert server.asked == [], "what is there needs no network"
    assert capsys.readouterr().out == ""


def test_the_folder_of_the_text_encoders(server):
    folder = own_text_folder(SPEC, True)
    for name, content in FILES.items():
        assert not name.startswith(TEXT_FOLDERS) or (folder / name).read_bytes() == content
    assert not (folder / "ae.safetensors").exists()
    server.asked.clear()
    assert own_text_folder(SPEC, True) == folder
    assert server.asked == []


def test_the_folder_without_weights_is_not_taken_for_whole(server):
    folder = own_text_folder(SPEC, True, weights=False)
    assert (folder / "tokenizer_2" / "tokenizer_config.json").exists()
    assert server.transfers == []
    own_text_folder(SPEC, True)
    assert (folder / "text_encoder" / "model.safetensors").exists()


def test_a_folder_broken_off_half_way_is_not_taken_for_whole(server, monkeypatch):
    download = huggingface_hub.hf_hub_download

    def stops(repository, filename, **more):
        if filename == "text_encoder/config.json":
            raise KeyboardInterrupt
        return download(repository, filename, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stops)
    with pytest.raises(KeyboardInterrupt):
        own_text_folder(SPEC, True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert (own_text_folder(SPEC, True) / "tokenizer_2" / "tokenizer_config.json").exists()


def test_the_command_fetches_all_and_says_where(server, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux", "download", "flux-dev"])
    cli.app()
    said = capsys.readouterr().out
    assert f"{len(FILES)} files" in said
    for line in said.splitlines()[2:]:
        assert Path(line.strip()).exists()
    assert len(said.splitlines()) == 2 + 2 + len(TEXT_FOLDERS)
    cli.app()
    assert "files" not in capsys.readouterr().out, "nothing is left to fetch"


@pytest.mark.parametrize(
    ("name", "expected", "status"),
    [("flux-nano", "part of this package", 0), ("flux-dve", "did you mean", 2)],
)
def test_the_command_on_other_names(server, name, expected, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux", "download", name])
    code = 0
    try:
        cli.app()
    except SystemExit as end:
        code = end.code
    assert code == status
    said = "".join(capsys.readouterr())
    assert expected in said
    assert server.asked == []


# ---- offline


@pytest.mark.parametrize("how", ["asked for", "by variable"])
def test_offline_nothing_is_asked(server, how, monkeypatch):
    path = own_flow()
    server.asked.clear()
    if how == "by variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = how == "by variable"
    assert own_flow(download=download) == path
    with pytest.raises(InputError, match=r"not on this machine, .* HF_HUB_OFFLINE"):
        own_text_folder(SPEC, download)
    with pytest.raises(InputError, match="not on this machine"):
        Repository(SPEC.repo_id, SPEC.licence).fetch(["ae.safetensors"], download, renew=True)
    assert server.asked == []


def test_the_variables_are_obeyed(server, tmp_path):
    """In a process of its own, since the hub's client reads them when it is imported."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FLUX_", "HUGGING"))
    }
    own = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": constants.ENDPOINT,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }

    def run(**more):
        command = [sys.executable, "-m", "flux", "download", "flux-dev"]
        return subprocess.run(command, env={**kept, **own, **more}, cwd=ROOT, capture_output=True, text=True)

    refused = run(HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE" in refused.stderr
    assert server.asked == []
    done = run()
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'home' / 'hub'}" in done.stdout
    assert "11 files" in done.stdout


# ---- a cache that lacks something


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
    ],
)
def test_what_a_cached_folder_lacks_is_fetched(server, name):
    folder = own_text_folder(SPEC, True)
    (folder / name).unlink()
    with pytest.raises(InputError, match="not on this machine"):
        own_text_folder(SPEC, False)
    assert own_text_folder(SPEC, True) == folder
    assert (folder / name).read_bytes() == FILES[name]


def test_a_missing_shard_is_fetched(server, monkeypatch):
    """All that the index names is needed, not any one file."""
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    monkeypatch.delitem(FILES, "text_encoder_2/model.safetensors")
    for name, content in zip(
        [*shards, "model.safetensors.index.json"], [FLOW, FLOW + b"2", index], strict=True
    ):
        monkeypatch.setitem(FILES, f"text_encoder_2/{name}", content)
    folder = own_text_folder(SPEC, True)
    lost = folder / "text_encoder_2" / shards[1]
    lost.resolve().unlink()
    lost.unlink()
    server.asked.clear()
    own_text_folder(SPEC, True)
    assert len(server.transfers) == 1
    assert lost.read_bytes() == FLOW + b"2"
