"""The endpoints over HTTP, as programs meet them, and what else the server answers."""

import gc
import importlib.util
import json
import re
import threading
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from helpers.studio import ROOT
from helpers.waiting import until

from flux.studio.app import Address, serve
from flux.vital_layers import remembered_scan
from flux.weights.find import checkpoint_of


def test_client_example(url, capsys):
    spec = importlib.util.spec_from_file_location("studio_client", ROOT / "examples" / "studio_client.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(url, num_steps=2, size=64)
    assert "vital layers:" in capsys.readouterr().out


def test_warnings_come_back(client):
    how = {"num_steps": 1, "height": 128, "api_name": "/generate"}
    *_, warned = client.predict("an elefant", width=130, negative_prompt="a cat", **how)
    assert "'elefant' (near: elephant" in warned[0]
    assert warned[1:] == [
        "without effect: negative_prompt (true_cfg is 1)",
        "width 130 is rounded down to 128, a multiple of 16",
    ]
    *_, warned = client.predict("a dog", width=64, **{**how, "height": 64})
    assert "far from 256x256" in warned[0]
    how["width"] = 128
    *_, warned = client.predict("a dog", ["a catt"], **{**how, "num_steps": 2, "api_name": "/edit"})
    assert len(warned) == 1
    assert "catt" in warned[0]
    *_, warned = client.predict(["a dogg"], layers=[0], **{**how, "api_name": "/scan"})
    assert len(warned) == 1
    assert "dogg" in warned[0]
    assert client.predict("an elephant", **how)[2] == []
    *_, warned = client.predict("a dog and " * 13 + "in the snow", **how)
    assert len(warned) == 1
    assert "overlooks its last words, 'in the snow'" in warned[0]


def test_the_content_filter_over_http(client, filtered, photo_file):
    how = {"width": 64, "height": 64, "num_steps": 2}
    for name, given in (
        ("generate", {"prompt": "a dog"}),
        ("generate", {"prompt": "a dog", "image": handle_file(photo_file)}),
        ("edit", {"prompt": "a dog", "edits": ["a cat"]}),
        ("edit", {"prompt": "a dog", "edits": ["a cat"], "photo": handle_file(photo_file)}),
        ("scan", {"prompts": ["a filtered dog"], "layers": [0]}),
    ):
        with pytest.raises(Exception, match="content filter"):
            client.predict(**given, **how, api_name=f"/{name}")


def test_endpoints_are_named(client):
    named = set(client.view_api(return_format="dict")["named_endpoints"])
    assert named == {"/models", "/generate", "/edit", "/scan"}


def test_a_scan_stays_with_its_visitor(client, url, served, photo_file):
    """It changes the default layers of nobody else, nor of the operator's own demo 4."""
    how = {"width": 64, "height": 64, "num_steps": 2}
    other = Client(url, verbose=False)

    def layers(caller) -> list[int]:
        _, record, _ = caller.predict("a dog", ["a cat"], **how, api_name="/edit")
        return json.loads(Path(record).read_text())["settings"]["vital_layers"]

    before = layers(other)
    remembered = remembered_scan(checkpoint_of(served.defaults))
    found, *_ = client.predict(["a nonsense"], top=1, **how, api_name="/scan")
    assert layers(client) == found["vital_layers"] != before
    assert layers(other) == before
    assert not remembered.is_file()


def test_nobody_fills_the_line(client, served):
    """While another run has its turn, eight of a caller may wait."""
    with served.line.join("another", "edit") as first:
        list(served.line.wait(first))
        jobs = [client.submit("a dog", num_steps=1, api_name="/generate") for _ in range(12)]
        until(lambda: sum(job.done() for job in jobs) == 4)
    refused = [str(error) for error in (job.exception(timeout=120) for job in jobs) if error]
    assert len(refused) == 4
    assert all("at once" in message for message in refused)


def test_many_at_once(url):
    """All are answered, one after the other, and memory stays level."""
    clients = [Client(url, verbose=False) for _ in range(3)]

    def round_of(count):
        jobs = [
            clients[seed % 3].submit("a dog", seed=seed, num_steps=1, api_name="/generate")
            for seed in range(count)
        ]
        results = [job.result(timeout=120) for job in jobs]
        gc.collect()
        return results, resident()

    _, before = round_of(3)
    results, after = round_of(12)
    assert len({images[0] for images, *_ in results}) == 12
    assert after - before < 60 * 2**20
    assert threading.active_count() < 100


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])


REFUSED = [
    ({"width": 10**6, "height": 10**6}, "1000000x1000000"),
    ({"width": -5}, "width"),
    ({"num_steps": 10**9}, "steps"),
    ({"count": 10**30}, "count"),
    ({"prompt": "a" * 50_000}, "letters"),
    ({"image": {"path": "/etc/passwd"}}, "not uploaded"),
    ({"image": {"path": "../../secret.png"}}, "not uploaded"),
    ({"seed": "x"}, "seed"),
]


def test_refused_with_a_message(client):
    for given, said in REFUSED:
        with pytest.raises(Exception, match=said):
            client.predict(**{"prompt": "a dog", **given}, api_name="/generate")
    assert client.predict("a dog", num_steps=1, api_name="/generate")


def test_uploads_over_http(client, url, served, photo_file, tmp_path):
    images, *_ = client.predict(
        "a dog",
        ["a cat"],
        photo=handle_file(photo_file),
        layers=[0],
        width=64,
        height=64,
        num_steps=2,
        api_name="/edit",
    )
    assert len(images) == 2
    (tmp_path / "no.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(Exception, match=r"no\.png"):
        client.predict("a dog", image=handle_file(tmp_path / "no.png"), api_name="/generate")
    large = {"files": ("large.png", b"0" * (served.limits.upload_bytes + 10**6))}
    answer = httpx.post(f"{url}gradio_api/upload", files=large, timeout=60)
    assert answer.status_code == 413
    assert httpx.get(url).status_code == 200


def test_nothing_else_is_served(url, served):
    (served.folder / "secret.txt").write_text("secret")
    inside = served.sessions.folder
    paths = [
        "/etc/passwd", str(ROOT / "README.md"), "README.md", str(served.folder / "secret.txt"),
        f"{inside}/../secret.txt", f"{inside}/..%2fsecret.txt", f"{inside}/%2e%2e/secret.txt",
    ]  # fmt: skip
    for path in paths:
        answer = httpx.get(f"{url}gradio_api/file={path}")
        assert answer.status_code in (403, 404), path


def test_nothing_is_fetched_from_elsewhere(url, client):
    for path in (
        "file=http://example.com/a.png", "file/https://example.com/a.png", "file=ftp://example.com/a.png",
        "proxy=https://example.com/a.png", "deep_link?session_hash=a", "runs",
    ):  # fmt: skip
        assert httpx.get(f"{url}gradio_api/{path}").status_code == 403, path
    there = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="upload the file itself"):
        client.predict("a dog", image=there, api_name="/generate")


def test_the_queue_cannot_be_passed_by(url):
    answer = httpx.post(f"{url}gradio_api/api/generate", json={"data": ["a dog"]})
    assert answer.status_code in (401, 403, 404, 405)


def test_auth(served):
    app, url, _ = serve(served, Address("127.0.0.1", auth="me:secret"), prevent_thread_lock=True, quiet=True)
    try:
        with pytest.raises(Exception, match=r"(?i)auth|credentials|login"):
            Client(url, verbose=False)
        assert Client(url, auth=("me", "secret"), verbose=False).predict(
            "a dog", num_steps=1, api_name="/generate"
        )
    finally:
        app.get_blocks().close(verbose=False)
