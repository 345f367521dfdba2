"""What no visitor should send the studio, and no program: each ends as one readable line, and it goes on."""

import asyncio
import json

import pytest
import torch

gr = pytest.importorskip("gradio")

from gradio.context import LocalContext  # noqa: E402
from helpers.studio import make_studio  # noqa: E402

from flux.studio.page import build  # noqa: E402

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
def page(studio):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(studio.folder / "served"))
        page = build(studio)
        page.has_launched = True  # else files are checked as those of its own author
        yield page


def ask(page, event, data, session="a") -> str | None:
    """What the visitor is told of an event that cannot be; None: it could."""
    asked = {"request": gr.Request(session_hash=session), "in_event_listener": True}
    LocalContext.blocks.set(page)
    try:
        with torch.inference_mode():
            asyncio.run(page.process_api(event, list(data), **asked))
    except gr.Error as error:
        assert error.message and "\n" not in error.message and len(error.message) < 250, error.message
        assert "/tmp" not in error.message, error.message
        return error.message
    return None


def endpoint(page, name):
    return next(event for event in page.fns.values() if event.api_name == name)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in ENDPOINTS.items() for field in fields]
)
def test_endpoints(page, name, field):
    event, fields = endpoint(page, name), ENDPOINTS[name]
    for value in ABSURD:
        told, fits = ask(page, event, {**fields, field: value}.values()), value in FITTING.get(field, ())
        assert (told is None) == fits and "went wrong" not in (told or ""), value


@pytest.mark.parametrize("name", ENDPOINTS)
def test_endpoints_answer_what_is_right(page, name):
    fields = ENDPOINTS[name]
    assert ask(page, endpoint(page, name), fields.values()) is None
    needed = ("prompt", "edits", "prompts", "num_steps")  # None of the others: as the page has it
    assert ask(page, endpoint(page, name), [fields[f] if f in needed else None for f in fields]) is None


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
                told = ask(page, event, [*usual[:place], value, *usual[place + 1 :]])
                # What is checked before a run has words for all; the rest no hand can do wrong.
                assert event.name != "begin" or "went wrong" not in (told or ""), (
                    event.api_name,
                    part.label,
                    value,
                )


def test_a_slider_that_was_cleared(page):
    event = next(event for event in page.fns.values() if event.name == "begin")
    values = [getattr(part, "value", None) for part in event.inputs]
    place = next(place for place, part in enumerate(event.inputs) if part.label == "Width")
    assert ask(page, event, values) is None
    assert (
        ask(page, event, [*values[:place], None, *values[place + 1 :]])
        == "Width: expected a number, got None"
    )


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
    """`said` None: as much of it is taken as this model has."""
    event = next(event for event in page.fns.values() if event.name == "dropped")
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    path = studio.folder / "served" / "dropped" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    told = ask(page, event, [{"path": str(path), "meta": {"_type": "gradio.FileData"}}])
    assert (told is None) if said is None else said in told and "went wrong" not in told


def test_a_zip_of_nothing(page):
    event = next(event for event in page.fns.values() if event.name == "pack")
    assert "nothing to save" in ask(page, event, [], session="another")
