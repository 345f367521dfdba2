"""Downloads: what goes well, what is mended, what is told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub_server import FILES, FLOW, SPEC, lie_at
from huggingface_hub import constants

from flux import cli
from flux.errors import InputError
from flux.specs import configs
from flux.weights import hub
from flux.weights.hub import TEXT_FOLDERS, own_file, own_text_folder

ROOT = Path(__file__).parents[2]


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def flow(spec=SPEC, download=True) -> Path:
    return own_file(spec, spec.repo_flow, download)


def partials() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*.part"))


def snapshots() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if path.is_file()]


# ---- what goes well


def test_a_file_is_fetched_once(server, capsys):
    path = flow()
    assert path.read_bytes() == FLOW
    assert path.is_relative_to(constants.HF_HUB_CACHE)
    said = capsys.readouterr().out
    assert "1 files, 0.00 GB" in said
    assert SPEC.licence in said
    assert SPEC.repo_id in said
    server.asked.clear()
    assert flow() == path
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


# ---- what goes wrong and is mended


def test_a_dropped_connection_goes_on_where_it_stopped(server):
    server.drop_at = 30_000
    assert flow().read_bytes() == FLOW
    assert server.transfers == [None, "bytes=30000-", "bytes=60000-"]


def test_a_later_run_goes_on_where_an_earlier_one_stopped(server, capsys):
    server.drop_at, server.down_after = 30_000, 1
    with pytest.raises(InputError, match="status 500: try again later; what has come so far is kept"):
        flow()
    [part] = partials()
    assert part.stat().st_size == 30_000
    assert snapshots() == []
    server.reset()
    capsys.readouterr()
    assert flow().read_bytes() == FLOW
    assert server.transfers == ["bytes=30000-"]
    assert partials() == []
    assert "0.00 GB are here already" in capsys.readouterr().out


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_asked_again(server, status):
    server.refusals = [status] * 3
    assert flow().read_bytes() == FLOW
    assert len(server.pauses) >= 3
    assert server.pauses == sorted(server.pauses), "longer each time"


def test_a_file_damaged_on_the_way_is_fetched_again(server):
    server.damaged = 1
    assert flow().read_bytes() == FLOW
    assert server.transfers == [None, None]


def test_damage_from_an_earlier_run_is_found(server):
    """The size alone would pass."""
    flow()
    [blob] = Path(constants.HF_HUB_CACHE).rglob("blobs/*")
    blob.rename(blob.with_name(f"{blob.name}.part"))
    blob.with_name(f"{blob.name}.part").write_bytes(b"?" + FLOW[1:100])
    for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*"):
        path.unlink()
    assert flow().read_bytes() == FLOW
    assert server.transfers[-2:] == ["bytes=100-", None]


# ---- what cannot be mended


def test_a_file_that_is_always_damaged_takes_no_place(server):
    server.damaged = 10
    with pytest.raises(InputError, match=r"flux1-dev.safetensors .* damaged .* SHA-256"):
        flow()
    assert snapshots() == []
    assert partials() == []


def test_a_damaged_renewal_leaves_the_good_file(server, monkeypatch):
    path = flow()
    monkeypatch.setitem(FILES, "flux1-dev.safetensors", FLOW[:-4] + b"new!")
    server.damaged = 10
    with pytest.raises(InputError, match="SHA-256"):
        hub.fetch(SPEC, [SPEC.repo_flow], renew=True)
    assert flow() == path
    assert path.read_bytes() == FLOW


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (
            (403, {"X-Error-Code": "GatedRepo"}),
            r"accept its licence \(FLUX.1 \[dev\] non-commercial\) at http",
        ),
        ((401, {"X-Error-Code": "GatedRepo"}), "hf auth login"),
        (401, "HF_TOKEN"),
        ((401, {"X-Error-Code": "RepoNotFound"}), "HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "there is no http.*HF_TOKEN"),
        (500, "status 500: try again later"),
        (429, "status 429: try again later"),
    ],
    ids=str,
)
def test_refusals_say_what_to_do(server, refusal, expected):
    server.refusals, server.stubborn = [refusal], True
    with pytest.raises(InputError, match=expected) as error:
        flow()
    assert SPEC.repo_id in str(error.value)
    assert "\n" not in str(error.value)
    assert sum(server.pauses) == (62 if refusal in (500, 429) else 0), "patience where it may help"
    assert snapshots() == []


def test_schnell_has_another_licence(server):
    server.refusals, server.stubborn = [(403, {"X-Error-Code": "GatedRepo"})], True
    with pytest.raises(InputError, match=r"accept its licence \(Apache-2.0\)"):
        flow(configs["flux-schnell"])


def test_a_hub_that_does_not_answer(server, monkeypatch, capsys):
    """As a rule it is this machine that is offline: it is told soon."""
    lie_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(InputError, match=r"cannot be reached .* HF_ENDPOINT to a mirror"):
        flow()
    assert server.pauses == [2, 4]
    for line, pause in zip(said(capsys), (2, 4), strict=True):
        assert line == f"The hub does not answer (ConnectError): trying again in {pause} s"


def test_a_file_that_the_repository_lacks(server):
    with pytest.raises(InputError, match=r"nothing.safetensors in black-forest-labs/FLUX.1-dev"):
        flow(replace(SPEC, repo_flow="nothing.safetensors"))


def test_a_full_disk_is_told_before_anything_is_fetched(server, monkeypatch):
    full = shutil_usage(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"GB of room at .* HF_HOME"):
        flow()
    assert server.transfers == []


def shutil_usage(free: int):
    import shutil

    return shutil._ntuple_diskusage(free, 0, free)


# ---- offline


@pytest.mark.parametrize("how", ["asked for", "by variable"])
def test_offline_nothing_is_asked(server, how, monkeypatch):
    path = flow()
    server.asked.clear()
    if how == "by variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = how == "by variable"
    assert flow(download=download) == path
    with pytest.raises(InputError, match=r"not on this machine, .* HF_HUB_OFFLINE"):
        own_text_folder(SPEC, download)
    with pytest.raises(InputError, match="not on this machine"):
        hub.fetch(SPEC, ["ae.safetensors"], download, renew=True)
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


# ---- refusals in the hub's own words


@pytest.mark.parametrize(
    ("status", "code", "words", "expected"),
    [
        (
            403,
            "",
            "Please enable access to public gated repositories in your fine-grained token settings.",
            r"the token may not read it .*fine-grained.*settings/tokens",
        ),
        (
            401,
            "",
            "Invalid credentials in Authorization header",
            r"token is not valid .*Invalid cred.*HF_TOKEN",
        ),
        (
            403,
            "DisabledRepo",
            "Access to this resource is disabled.",
            "has disabled it .*give the files' paths",
        ),
        (403, "GatedRepo", "Your request is awaiting a review.", "accept its licence .*awaiting a review"),
    ],
)
def test_the_hubs_words_are_passed_on(server, status, code, words, expected):
    headers = {"X-Error-Message": words, **({"X-Error-Code": code} if code else {})}
    server.refusals, server.stubborn = [(status, headers)], True
    with pytest.raises(InputError, match=expected) as caught:
        flow()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "nonsense://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_proxy_that_refuses(server, proxy, tmp_path):
    """In a process of its own, since the hub's client keeps its session."""
    own = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://hub.invalid",
        "HTTP_PROXY": proxy,
        "http_proxy": proxy,
    }
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    code = "import sys, time; time.sleep = print; sys.argv = ['flux', 'download', 'flux-dev']; "
    code += "from flux import cli; cli.app()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **own}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Could not get")
    assert "Traceback" not in done.stderr


# ---- a home that is missing or closed


def test_no_home_folder(server, monkeypatch):
    """Then the hub's client has "~" for the folder, which would be made where one stands."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(InputError, match=r"no home folder for the cache .*: set HF_HOME"):
        flow()
    assert not Path("~").exists()


def test_a_cache_that_cannot_be_written(server, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"blobs cannot be written: set HF_HOME to a folder that can$"):
        flow()
