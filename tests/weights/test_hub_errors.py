"""Refusals of the hub, of a proxy or of this machine: one line each, which says what to do."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import SPEC, lie_at, own_flow, snapshots
from huggingface_hub import constants

from flux.errors import InputError
from flux.specs import configs

ROOT = Path(__file__).parents[2]


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
        own_flow()
    assert SPEC.repo_id in str(error.value)
    assert "\n" not in str(error.value)
    assert sum(server.pauses) == (62 if refusal in (500, 429) else 0), "patience where it may help"
    assert snapshots() == []


def test_schnell_has_another_licence(server):
    server.refusals, server.stubborn = [(403, {"X-Error-Code": "GatedRepo"})], True
    with pytest.raises(InputError, match=r"accept its licence \(Apache-2.0\)"):
        own_flow(configs["flux-schnell"])


def test_a_hub_that_does_not_answer(server, monkeypatch, capsys):
    """As a rule it is this machine that is offline: it is told soon."""
    lie_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(InputError, match=r"cannot be reached .* HF_ENDPOINT to a mirror"):
        own_flow()
    assert server.pauses == [2, 4]
    for line, pause in zip(capsys.readouterr().err.splitlines(), (2, 4), strict=True):
        assert line == f"The hub does not answer (ConnectError): trying again in {pause} s"


@pytest.mark.parametrize("endpoint", ["mirror.example", ""])
def test_an_endpoint_that_is_no_address(server, endpoint, monkeypatch):
    """No patience helps."""
    lie_at(endpoint, monkeypatch)
    with pytest.raises(InputError, match=f"HF_ENDPOINT is '{endpoint}': begin it with https://, or unset it"):
        own_flow()
    assert server.pauses == []


def test_a_token_with_another_letter(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    with pytest.raises(InputError, match="the token has a letter that tokens never have"):
        own_flow()


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
        own_flow()
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
        own_flow()
    assert not Path("~").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOTDIR])
def test_a_cache_that_cannot_be_written(server, code, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"blobs cannot be written: set HF_HOME to a folder that can$"):
        own_flow()
