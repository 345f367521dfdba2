"""What the page's tabs have in common: a run from click to end, and the sliders of every model."""

import html
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import randrange
from typing import Any

import gradio as gr

from flux.settings.demos import ModelSettings
from flux.studio.engine import Report
from flux.studio.forms import texts_of
from flux.studio.state import Studio
from flux.studio.widgets import duration, news
from flux.vocabulary import unknown_words

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# For what may fail: gradio shows errors only of what was queued.
AT_ONCE = {**QUIET, "concurrency_limit": None}


def connect(
    studio: Studio,
    triggers: Iterable[Callable],
    inputs: list[Any],
    check: Callable[..., ModelSettings],
    work: Callable[..., Iterator[tuple[Report | None, dict]]],
    outputs: list[Any],
    line: gr.HTML,
    go: Iterable[gr.Button],
    stop: gr.Button,
    note: gr.HTML,
    seed: tuple[gr.Checkbox, gr.Number] | None = None,
) -> None:
    """Lets `triggers` begin a run, and the button `stop` end it.

    Args:
        check: called at once with the values of `inputs`; gives the settings of the run, or raises
            InputError if they cannot be used.
        work: called with the visit and the values when the model is free; yields reports, each with what is
            to be shown by component, and None for the report at its end.
        line: where reports are shown.
        note: where words are named that the model does not know.
        seed: whether a new seed is wanted, and where it goes.
    """
    buttons = [*go, stop]

    def switched(running: bool) -> dict[gr.Button, dict]:
        return {button: gr.update(interactive=running == (button is stop)) for button in buttons}

    def begin(request: gr.Request, *values):
        visit = studio.visits.of(request.session_hash)
        unknown = words_note(studio, check(*values))
        if visit.busy:  # Enter in a prompt
            return {line: gr.skip()}
        visit.stop.clear()
        return {note: unknown, line: news(Report("waiting for the model")), **switched(True)}

    def run(request: gr.Request, *values):
        begun, visit = time.perf_counter(), studio.visits.of(request.session_hash)
        visit.busy = True
        try:
            for report, shown in work(visit, *values):
                yield {line: news(report), **shown} if report else shown
        except Exception:
            # Not by an event of its own: what is to follow an error in mid-run is not called.
            yield {line: news(None, "Ready."), **switched(False)}
            raise
        finally:
            visit.busy = False
        took = duration(time.perf_counter() - begun)
        told = f"Stopped after {took}." if visit.stop.is_set() else f"Done in {took}."
        yield {line: news(None, told), **switched(False)}

    if seed:
        asked = gr.on(list(triggers), new_seed, [*seed], seed[1], queue=False, **QUIET)
        asked = asked.then(begin, inputs, [note, line, *buttons], **AT_ONCE)
    else:
        asked = gr.on(list(triggers), begin, inputs, [note, line, *buttons], **AT_ONCE)
    turns = {"concurrency_id": "model", "concurrency_limit": 1}
    asked.success(run, inputs, [line, *buttons, *outputs], **turns, **QUIET)

    def halt(request: gr.Request):
        studio.visits.of(request.session_hash).stop.set()
        return gr.update(interactive=False)

    stop.click(halt, None, stop, queue=False, **QUIET)


def words_note(studio: Studio, settings: ModelSettings) -> str:
    """As HTML: the words of these settings that the model was not trained on, with near ones."""
    if studio.spec.vocabulary is None:
        return ""
    found: dict[str, list[str]] = {}
    for text in texts_of(settings):
        found |= unknown_words(text, studio.spec.vocabulary)
    named = [
        f"<b>{html.escape(word)}</b>" + (f" (near: {', '.join(near)})" if near else "")
        for word, near in found.items()
    ]
    return (
        f'<div class="note">Not known to {studio.defaults.model}, and overlooked: {", ".join(named)}</div>'
        if named
        else ""
    )


def words_place() -> gr.HTML:
    """Where `words_note` goes: under the prompt, and nothing as long as all words are known."""
    return gr.HTML("", elem_classes="words")


def fill(samples: Sequence[Sequence[Any]], *more: Any) -> str:
    """JavaScript for an example that is clicked: its values, and `more`, without asking the server."""
    return f"index => [...{json.dumps(samples)}[index], ...{json.dumps(more)}]"


def new_seed(fresh: bool, seed: float | None) -> float | None:
    """Another seed, if a fresh one is wanted."""
    return randrange(2**32) if fresh else seed


def size_slider(studio: Studio, label: str, value: int) -> gr.Slider:
    return gr.Slider(64, studio.limits.side, value, step=16, label=label, min_width=200)


def guidance_slider(studio: Studio) -> gr.Slider:
    """Hidden where the model knows no such number."""
    return gr.Slider(
        0, 10, studio.defaults.guidance, step=0.1, label="Guidance", visible=studio.spec.params.guidance_embed
    )
