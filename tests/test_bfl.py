"""Hosted models, against a server on this machine that answers as Black Forest Labs' does."""

import http.server
import json
import threading
import time
from io import BytesIO

import pytest
from PIL import Image

from flux import bfl, cli
from flux.bfl import HostedSettings, generate, track_usage_via_api
from flux.errors import InputError
from flux.specs import HOSTED, configs, get_spec

IMAGE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
READY = {"status": "Ready", "result": {"sample": "{base}/delivery/image.png"}}


class Server(http.server.ThreadingHTTPServer):
    """Answers as it is told to.

    Attributes:
        asked: method, path, key and body of each request.
        submissions: what to answer to POST, in this order, the last one again and again: an object, or a
            status with one.
        polls: what to answer to GET, likewise.
        image: the content of the image's address.
    """

    def reset(self):
        self.asked, self.submissions, self.polls = (
            [],
            [{"id": "7", "polling_url": "{base}/v1/poll?id=7"}],
            [READY],
        )
        buffer = BytesIO()
        IMAGE.save(buffer, "PNG")
        self.image = buffer.getvalue()

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.note(json.loads(body))
        self.answer_from(self.server.submissions)

    def do_GET(self):
        self.note(None)
        if self.path.startswith("/delivery/"):
            return self.answer(200, self.server.image)
        if self.path.startswith("/moved/"):
            return self.answer(302, b"")
        self.answer_from(self.server.polls)
        return None

    def note(self, body):
        self.server.asked.append((self.command, self.path, self.headers.get("x-key"), body))

    def answer_from(self, answers):
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        status, found = found if isinstance(found, tuple) else (200, found)
        text = found if isinstance(found, str) else json.dumps(found)
        self.answer(status, text.replace("{base}", self.server.base).encode())

    def answer(self, status, content):
        self.send_response(status)
        if status == 302:
            moved = self.path.startswith("/moved/")
            self.send_header("Location", "/delivery/image.png" if moved else "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    server = Server(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def server(running, monkeypatch):
    running.reset()
    running.pauses = []
    monkeypatch.setenv("BFL_API_KEY", "secret")
    monkeypatch.setenv("BFL_API_ENDPOINT", running.base)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", running.pauses.append)
    return running


def make(name="flux-pro-1.1", **fields) -> Image.Image:
    return generate(HostedSettings(name, **fields), "a dog", 7)


def refused(expected: str, name="flux-pro-1.1", **fields) -> None:
    with pytest.raises(InputError, match=expected) as error:
        make(name, **fields)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


# ---- what goes well


def test_submit_poll_fetch(server):
    server.polls = [{"status": "Pending"}, {"status": "Pending"}, READY]
    assert make(width=1024, height=768).tobytes() == IMAGE.tobytes()
    body = {"prompt": "a dog", "seed": 7, "output_format": "png", "width": 1024, "height": 768}
    poll = ("GET", "/v1/poll?id=7", "secret", None)
    assert server.asked == [
        ("POST", "/v1/flux-pro-1.1", "secret", body),
        *[poll] * 3,
        ("GET", "/delivery/image.png", None, None),
    ], "the key goes to the interface only"
    assert server.pauses == [bfl.POLL_EVERY] * 2


def test_what_each_model_is_sent(server):
    make("flux-pro", num_steps=30, guidance=2.5)
    make("flux-pro-1.1-ultra", width=1600, height=900)
    make("flux-2-flex", width=2048, height=256, guidance=8)
    sent = [body for method, _, _, body in server.asked if method == "POST"]
    own = [
        {key: x for key, x in body.items() if key not in ("prompt", "seed", "output_format")} for body in sent
    ]
    assert own == [
        {"steps": 30, "guidance": 2.5},
        {"aspect_ratio": "1600:900"},
        {"width": 2048, "height": 256, "guidance": 8},
    ]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.submissions = [(status, {}), (status, {}), *server.submissions]
    server.polls = [(status, {}), READY]
    assert make().size == IMAGE.size
    assert server.pauses == [1, 2, 1]


def test_a_task_may_be_unknown_at_first(server):
    server.polls = [(404, {}), {"status": "Task not found"}, READY]
    assert make().size == IMAGE.size


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flux", "--name", "flux-pro", "--prompt", "a dog|a cat", "--seed", "3",
                                     "--num_steps", "20", "--output_dir", str(tmp_path)])  # fmt: skip
    cli.app()
    from flux.images.io import read_metadata

    assert sorted(path.name for path in tmp_path.iterdir()) == ["img_0.jpg", "img_1.jpg"]
    about = read_metadata(tmp_path / "img_1.jpg")
    assert about == {"model": "flux-pro", "prompt": "a cat", "seed": 4, "num_steps": 20}


def test_a_delivery_elsewhere_is_followed_without_the_key(server):
    server.polls = [{"status": "Ready", "result": {"sample": "{base}/moved/image.png"}}]
    assert make().tobytes() == IMAGE.tobytes()
    assert [(path, key) for _, path, key, _ in server.asked[2:]] == [
        ("/moved/image.png", None),
        ("/delivery/image.png", None),
    ]


# ---- usage


def test_a_usage_report(server):
    server.submissions = [(503, {}), (200, "")]
    track_usage_via_api("flux-dev", 3)
    report = ("POST", "/v1/licenses/models/flux-1-dev/usage", "secret", {"number_of_generations": 3})
    assert server.asked == [report] * 2


def test_models_without_usage_reports(server, capsys):
    track_usage_via_api("flux-schnell")
    assert capsys.readouterr().out == "flux-schnell needs no usage report\n"
    assert server.asked == []


def test_a_refused_usage_report(server):
    server.submissions = [(403, {})]
    with pytest.raises(InputError, match="may not use this model"):
        track_usage_via_api("flux-dev")


# ---- what goes wrong


def test_without_a_key(server, monkeypatch):
    monkeypatch.delenv("BFL_API_KEY")
    refused("set BFL_API_KEY")
    with pytest.raises(InputError, match="set BFL_API_KEY"):
        track_usage_via_api("flux-dev")
    assert server.asked == []


@pytest.mark.parametrize("key", ["sec\nret", "secret\u00e9", " "])
def test_a_broken_key(server, monkeypatch, key):
    monkeypatch.setenv("BFL_API_KEY", key)
    refused("set BFL_API_KEY")
    assert server.asked == []


def test_too_much(server, monkeypatch):
    monkeypatch.setattr(bfl, "MAX_IMAGE_BYTES", 100)
    refused("could not be fetched .more than 100 bytes")


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (401, {}, "key in BFL_API_KEY is not accepted"),
        (402, {"detail": "Insufficient credits"}, "no credits are left"),
        (403, {}, "may not use this model"),
        (404, {}, "not known there"),
        (400, {"detail": "bad\nthing"}, "status 400, bad thing"),
        (422, {"detail": [{"msg": "too many"}, {"msg": "no seed"}]}, "status 422, too many; no seed"),
        (422, "<html>", "status 422"),
        (429, {}, "too many tasks at once.*5 times.*try again later"),
        (503, {}, "busy .status 503."),
        (302, {}, "status 302"),
        (200, "<html>", "no JSON object .*BFL_API_ENDPOINT"),
        (200, [1], "no JSON object"),
    ],
)  # fmt: skip
def test_refused_submissions(server, status, answer, expected):
    server.submissions = [(status, answer)]
    refused(expected)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("Request Moderated", "prompt was refused by moderation"),
        ("Content Moderated", "withheld by moderation"),
        ("Task not found", "not known any more"),
        ("Error", "failed there"),
    ],
)
def test_endings_without_an_image(server, status, expected):
    server.polls = [{"status": "Pending"}, {"status": status}]
    refused(expected)


def test_no_answer_in_time(server, monkeypatch):
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    server.polls = [{"status": "Pending"}]
    refused("after 600 seconds: try again later")


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setenv("BFL_API_ENDPOINT", "http://127.0.0.1:9")
    refused("127.0.0.1:9 cannot be reached")


@pytest.mark.parametrize("place", ["http://evil.example/poll", "https://bfl.ai.example/poll", "None", ""])
def test_the_key_goes_to_nobody_else(server, place):
    server.submissions = [{"id": "7", "polling_url": place}]
    refused("key in BFL_API_KEY is not sent there")


@pytest.mark.parametrize("image", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_a_broken_image(server, image):
    server.image = image
    refused("could not be fetched")


@pytest.mark.parametrize("sample", ["file:///etc/passwd", "", 7])
def test_a_wrong_address(server, sample):
    server.polls = [{"status": "Ready", "result": {"sample": sample}}]
    refused("could not be fetched")


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        (
            "flux-pro-1.1",
            {"width": 100, "height": 768},
            "Got width 100, expected a multiple of 32 from 256 to 1440",
        ),
        ("flux-pro", {"width": 1024, "height": 1025}, "Got height 1025"),
        ("flux-pro", {"width": 1024}, "only one of width and height"),
        ("flux-pro", {"num_steps": 99}, "Got num_steps 99, expected 1 to 50"),
        ("flux-pro", {"guidance": 9.0}, "Got guidance 9.0, expected 1.5 to 5"),
        ("flux-pro-1.1", {"num_steps": 20}, "chooses for itself"),
        ("flux-pro-1.1-ultra", {"width": 3000, "height": 1000}, "21:9"),
    ],
)
def test_requests_that_the_model_does_not_take(server, name, fields, expected):
    refused(expected, name, **fields)
    assert server.asked == []


def test_the_command_refuses_what_only_local_models_do(server, monkeypatch, capsys):
    for option in ("--true_cfg=2", "--init_image=x.png", "--negative_prompt=x", "--track_usage"):
        monkeypatch.setattr("sys.argv", ["flux", "--name", "flux-pro", option])
        with pytest.raises(SystemExit) as end:
            cli.app()
        assert end.value.code == 2
        assert "is not run here" in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize("name", HOSTED)
def test_work_on_layers_is_refused_with_the_reason(name):
    assert name not in configs
    with pytest.raises(InputError, match=f"only Black Forest Labs runs: .* python -m flux --name {name}"):
        get_spec(name)


@pytest.mark.parametrize(("number", "name"), [(1, "layer"), (2, "skip"), (4, "edit")])
def test_demos_refuse_before_anything_is_loaded(number, name, monkeypatch, capsys):
    from importlib import import_module

    demo = import_module(f"demo_{number}_{name}")
    with pytest.raises(SystemExit) as end:
        demo.main(f"{name}.json", model="flux-pro")
    assert end.value.code == 2
    assert "its layers are not here" in capsys.readouterr().err
