"""Requests that nobody should send: each ends with one readable line, and the studio goes on."""

import asyncio
import json

import gradio as gr
import orjson
import pytest
import torch
from gradio.context import LocalContext
from gradio.state_holder import StateHolder
from helpers.studio import make_studio

from flux.studio.hardening import OwnFilesOnly, readable_errors
from flux.studio.page import build

UNEXPECTED = "went wrong"  # an error that has no words of its own
SERVER = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
ELSEWHERE = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
ABSURD = ["", "x", "\ud800", float("nan"), -1, 1e300, 10**30, True, [1, 2], {"a": 1}, SERVER, ELSEWHERE]
SIZE = {"width": 64, "height": 64, "num_steps": 2, "guidance": 3, "true_cfg": 1}
ENDPOINTS = {
    "generate": {
        "prompt": "a dog",
        "seed": 0,
        "count": 1,
        **SIZE,
        "negative_prompt": "",
        "image": None,
        "strength": 0.8,
    },
    "edit": {
        "prompt": "a dog",
        "edits": ["a cat"],
        "seed": 0,
        "layers": [0],
        "photo": None,
        "mask": None,
        "dose": None,
        "weight": None,
        "inject_from": None,
        "inject_until": None,
        "parts": None,
        "inversion": "midpoint",
        "paste_back": False,
        **SIZE,
        "negative_prompt": "",
    },
    "scan": {"prompts": ["a dog"], "seed": 0, "layers": [0], "top": 1, **SIZE},
}
FITTING = {"prompt": ["", "x"], "negative_prompt": ["", "x"], "layers": [[1, 2]], "paste_back": [True]}


@pytest.fixture(scope="module")
def studio(nano, tmp_path_factory):
    return make_studio(nano, tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def built(studio):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(studio.folder / "served"))
        page = build(studio)
        page.has_launched = True  # else files are checked as those of its own author
        yield page


@pytest.fixture
def page(built):
    """The page, which nobody has visited yet."""
    StateHolder().set_blocks(built)
    return built


def refusal(page, event, data, session="a") -> str | None:
    """The line that the visitor sees where an event fails, or None if it does not."""
    asked = {"request": gr.Request(session_hash=session), "in_event_listener": True}
    asked["state"] = page.state_holder[session]
    LocalContext.blocks.set(page)
    message = None
    try:
        with torch.inference_mode():
            answer = asyncio.run(page.process_api(event, list(data), **asked))
        orjson.dumps(answer, default=str)  # as gradio sends it
    except gr.Error as error:
        message = error.message
    if message is not None:
        assert 0 < len(message) < 250
        assert "\n" not in message
        assert "/tmp" not in message
    return message


def endpoint(page, name):
    return next(event for event in page.fns.values() if event.api_name == name)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in ENDPOINTS.items() for field in fields]
)
def test_endpoints(page, name, field):
    event, fields = endpoint(page, name), ENDPOINTS[name]
    for value in ABSURD:
        said = refusal(page, event, {**fields, field: value}.values())
        assert (said is None) == (value in FITTING.get(field, ())), value
        assert UNEXPECTED not in (said or ""), value


@pytest.mark.parametrize("name", ENDPOINTS)
def test_endpoints_answer_what_is_right(page, name):
    fields = ENDPOINTS[name]
    assert refusal(page, endpoint(page, name), fields.values()) is None
    needed = ("prompt", "edits", "prompts", "num_steps")  # None of the others: as the page has it
    assert refusal(page, endpoint(page, name), [fields[f] if f in needed else None for f in fields]) is None


# The page


def test_events_of_the_page(page):
    """Each field of each event, so also of /film: what a browser does not send, a program may."""
    for event in page.fns.values():
        fields = [
            part for part in event.inputs if event.fn and event.name and event.api_visibility != "public"
        ]
        usual = [part.value if hasattr(part, "value") else None for part in fields]
        for place, part in enumerate(fields):
            if part.stateful:
                continue
            for value in ("x", float("nan"), [1, 2], SERVER, ELSEWHERE):
                got = refusal(page, event, [*usual[:place], value, *usual[place + 1 :]])
                # What is checked before a run has words for all; the rest no hand can do wrong.
                assert event.name != "begin" or UNEXPECTED not in (got or ""), (
                    event.api_name,
                    part.label,
                    value,
                )


def test_numbers_that_are_missing_or_out_of_range(page):
    event = next(event for event in page.fns.values() if event.name == "begin")
    values = [getattr(part, "value", None) for part in event.inputs]
    assert refusal(page, event, values) is None
    for label, value, said in (
        ("Width", None, "Width: expected a number from 64 to 512, got None"),
        ("Width", 0, "Width: expected a number from 64 to 512, got 0"),
        ("Steps", 1000, "Steps: expected a number from 1 to 100, got 1000"),
        ("Seed", 10**30, "Seed: expected a number of at most 18 digits"),
        ("Seed", -5, "seed: expected at least 0, got -5"),
    ):
        place = next(place for place, part in enumerate(event.inputs) if part.label == label)
        assert said in refusal(page, event, [*values[:place], value, *values[place + 1 :]])


EDIT = {"prompt": "a dog", "edits": ["a cat"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 10**5, "no JSON"),
        (b"[]", "how it was made"),
        ({"demo": "scan", "settings": {}}, "how it was made"),
        ({"demo": "test", "settings": []}, "how it was made"),
        ({"demo": "test", "settings": {"prompts": ["a dog"], "seed": 10**30}}, "seed"),
        ({"demo": "test", "settings": {"prompts": "a dog"}}, "prompts"),
        ({"demo": "test", "settings": {"prompts": ["a dog"], "colour": 1}}, "colour"),
        ({"demo": "edit", "settings": {**EDIT, "dose": "huge"}}, "dose"),
        ({"demo": "edit", "settings": {**EDIT, "vital_layers": [1e300]}}, "vital_layers"),
        ({"demo": "edit", "settings": {**EDIT, "vital_layers": [0, 56]}}, None),
        ({"demo": "edit", "settings": EDIT, "layers": ["x", 99, None], "prompt": [1], "seed": "x"}, None),
        ({"demo": "edit", "settings": {**EDIT, "model": "none", "weight": {"3": 0.5}}}, None),
        ({"demo": "layer", "settings": {"prompt": "a dog", "layers": [0, 56]}, "prompt": 7}, None),
    ],
)
def test_settings_that_come_back(page, studio, content, said):
    """If `said` is None, as much is taken over as this model has."""
    event = next(event for event in page.fns.values() if event.name == "dropped")
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    path = studio.folder / "served" / "dropped" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    got = refusal(page, event, [{"path": str(path), "meta": {"_type": "gradio.FileData"}}])
    assert (got is None) == (said is None)
    assert (said or "") in (got or "")
    assert UNEXPECTED not in (got or "")


def test_what_is_gone_is_said(page, tmp_path):
    """Also where a button needs an image: errors of events that gradio does not queue would not be shown."""
    with pytest.raises(gr.Error, match="A file is gone"), readable_errors():
        (tmp_path / "gone").read_text()
    needing = [event for event in page.fns.values() if event.name in ("go_on", "correct", "send", "_select")]
    assert len(needing) == 4
    assert all(event.queue for event in needing)


def test_a_zip_of_nothing(page):
    event = next(event for event in page.fns.values() if event.name == "pack")
    assert "nothing to save" in refusal(page, event, [], session="another")


# Files


def test_paths_that_are_served(tmp_path):
    allowed = OwnFilesOnly(None, tmp_path).allowed
    assert allowed(f"/gradio_api/file={tmp_path}/stream/a.png")
    assert allowed("/gradio_api/queue/join")
    for path in (f"{tmp_path}/../b.png", "http://a.b/c.png", "a.png", "/etc/passwd", "a" * 5000, "/a\0b"):
        assert not allowed(f"/gradio_api/file={path}"), path
        assert not allowed(f"/under/gradio_api/file/{path}"), path
