"""Parts that the tabs share: a run from click to end, and fields of the settings of every model."""

import html
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import randrange
from typing import Any, Generic, Literal, TypedDict, TypeVar

import gradio as gr
from gradio.components import Component, FormComponent

from flux.settings.demos import ModelSettings
from flux.studio.engine import Update
from flux.studio.forms import Form, texts_in, unseen_words
from flux.studio.sessions import Session
from flux.studio.state import Studio
from flux.studio.widgets import UNLISTED, Changes, duration, status_html
from flux.studio.words import about
from flux.vocabulary import unknown_words

S = TypeVar("S", bound=ModelSettings)
FormFields = dict[str, Component]
"""The components of a form, by the names of their values."""

SMALLEST = 64  # side of an image in pixels, on the sliders
SHAPES = {"1:1": 1, "4:3": 4 / 3, "3:4": 3 / 4, "16:9": 16 / 9, "9:16": 9 / 16}


class Unqueued(TypedDict):
    """Options of an event that is handled at once. An error in it is not shown."""

    queue: Literal[False]
    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


class Concurrent(TypedDict):
    """Options of an event that does not wait for others. Only errors of queued events are shown."""

    concurrency_limit: None
    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


UNQUEUED: Unqueued = {"queue": False, **UNLISTED}
CONCURRENT: Concurrent = {"concurrency_limit": None, **UNLISTED}


class RunControls:
    """The components that every tab has for its runs. Each is added where its method is called.

    Attributes:
        words: The note that names words that the model does not know.
        start: The buttons that start a run.
        stop: The button that cancels it.
        status: The line that shows its progress.
        tab: The tab's name.
    """

    words: gr.HTML
    start: list[gr.Button]
    stop: gr.Button
    status: gr.HTML

    def __init__(self, studio: Studio, tab: str):
        self._studio, self.tab = studio, tab

    def add_buttons(self, label: str, *more: str) -> list[gr.Button]:
        """Adds the note, hidden as long as all words are known, then buttons to start and one to stop.

        Returns:
            The buttons that start a run, the main one first.
        """
        self.words = gr.HTML("", elem_classes="words")
        with gr.Row(elem_classes="actions"):
            self.start = [gr.Button(label, variant="primary", elem_id=f"{self.tab}-go")]
            self.start += [gr.Button(other, elem_id=f"{self.tab}-{other.lower()}") for other in more]
            self.stop = gr.Button("Stop", interactive=False, elem_id=f"{self.tab}-stop")
        return self.start

    def add_status(self, text: str = "Ready.") -> None:
        """Adds the status line."""
        self.status = gr.HTML(status_html(text), elem_id=f"{self.tab}-status")

    @property
    def buttons(self) -> list[gr.Button]:
        """All buttons."""
        return [*self.start, self.stop]

    def switched(self, running: bool) -> Changes:
        """Enables the buttons that start a run, or while one is in progress the one that stops it."""
        starting = {button: gr.update(interactive=not running) for button in self.start}
        return {**starting, self.stop: gr.update(interactive=running)}

    def wire_stop(self) -> None:
        """Lets the stop button cancel the session's run."""

        def cancel(request: gr.Request) -> dict[str, Any]:
            self._studio.line.stop(request.session_hash, self.tab)
            return gr.update(interactive=False)

        self.stop.click(cancel, None, self.stop, **UNQUEUED)


@dataclass(frozen=True, eq=False)
class RunButton(Generic[S]):
    """A button that starts a run from a form's values.

    Attributes:
        studio: The studio.
        controls: The tab's buttons, status line and note.
        fields: The components whose values make the form.
        settings_of: Makes the run's settings from the form. Raises InputError if they cannot be used.
        work: Called when the model is free. Yields updates with what they change on the page.
        buttons: The buttons that save what it makes, or go on from it.
    """

    studio: Studio
    controls: RunControls
    fields: FormFields
    settings_of: Callable[[Form], S]
    work: Callable[[Session, S, Form], Iterator[tuple[Update, Changes]]]
    buttons: list[Component] = field(default_factory=list)

    def wire(
        self,
        triggers: Sequence[Callable[..., Any]],
        outputs: Sequence[Component],
        new_seed: tuple[gr.Checkbox, gr.Number] | None = None,
    ) -> None:
        """Lets events start a run.

        Args:
            triggers: The events, such as `button.click`.
            outputs: The components that `work` changes.
            new_seed: Whether to draw a new seed first, and where it goes.
        """
        controls, inputs = self.controls, list(self.fields.values())
        lines = [controls.words, controls.status, *controls.buttons]
        if new_seed:
            seeded = gr.on(list(triggers), seed_of, [*new_seed], new_seed[1], **UNQUEUED)
            begun = seeded.then(self.begin, inputs, lines, **CONCURRENT)
        else:
            begun = gr.on(list(triggers), self.begin, inputs, lines, **CONCURRENT)
        changed = [controls.status, *controls.buttons, *outputs]
        self.buttons.extend(part for part in outputs if isinstance(part, gr.Button | gr.DownloadButton))
        begun.success(self.run, inputs, changed, concurrency_limit=None, **UNLISTED)

    def begin(self, request: gr.Request, *values: Any) -> Changes:
        """Checks the form, before the run waits for the model."""
        unknown = words_note(self.studio, self.settings_of(self._form(values)))
        if self.studio.line.has(request.session_hash, self.controls.tab):  # Enter was pressed in a prompt
            return {self.controls.status: gr.skip()}
        waiting = status_html(Update("waiting for the model"))
        return {self.controls.words: unknown, self.controls.status: waiting, **self.controls.switched(True)}

    def run(self, request: gr.Request, *values: Any) -> Iterator[Changes]:
        """Does the work when its turn comes, and shows its progress."""
        caller, tab, status = request.session_hash, self.controls.tab, self.controls.status
        if self.studio.line.has(caller, tab):  # "Edit" was clicked twice
            yield {status: gr.skip()}
            return
        begin, form = time.perf_counter(), self._form(values)
        finished, last = Changes(), Changes()  # what all results changed, and what the last one did
        # A preview of this run stands in the place of an earlier image, which must not be saved for it.
        unsaved: Changes = {button: gr.update(interactive=False) for button in self.buttons}
        try:
            with self.studio.turn(caller, tab) as (job, session, waiting):
                for update in waiting:
                    yield {status: status_html(update)}
                if not job.stop.is_set():
                    begin = time.perf_counter()
                    yield unsaved or {status: gr.skip()}
                    for update, changes in self.work(session, self.settings_of(form), form):
                        if update.result is not None:
                            finished, last = finished | changes, changes
                        yield {status: status_html(update), **changes}
                is_stopped = job.stop.is_set()
        except Exception:
            # Here and not in an event that follows: gradio calls none after an error in mid-run.
            yield {status: status_html("Ready."), **self.controls.switched(False)}
            raise
        took = duration(time.perf_counter() - begin)
        text = f"Stopped after {took}." if is_stopped else f"Done in {took}."
        # After Stop the last finished image, the one that is saved, takes the place of a preview. After the
        # end it is sent again: a busy page passes over an update that another one follows at once.
        again = finished if is_stopped else last
        yield {**again, status: status_html(text), **self.controls.switched(False)}

    def _form(self, values: Sequence[Any]) -> Form:
        return dict(zip(self.fields, values, strict=True))


def seed_of(new: bool, seed: float | None) -> float | None:
    """Draws a new seed if one is wanted."""
    return randrange(2**32) if new else seed


# ---- notes and examples


def kind_of_examples(studio: Studio) -> str:
    """Names the examples that suit a model: "large", "small", or "steered" for small ones that need an image.

    The image that such a model begins with shows a dog on the grass.
    """
    if studio.spec.folder is None:
        return "large"
    return "steered" if studio.spec.condition in ("control", "fill") else "small"


def words_note(studio: Studio, settings: ModelSettings) -> str:
    """Renders the words of these settings that the model was not trained on, or does not see."""
    found: dict[str, list[str]] = {}
    for text in texts_in(settings):
        found |= unknown_words(text, studio.spec.vocabulary) if studio.spec.vocabulary else {}
    named = [
        f"<b>{html.escape(word)}</b>" + (f" (near: {', '.join(near)})" if near else "")
        for word, near in found.items()
    ]
    known = f"Not known to {studio.defaults.model}, and ignored: {', '.join(named)}"
    lines = [*[known] * bool(named), *map(html.escape, unseen_words(studio, settings))]
    return f'<div class="note">{"<br>".join(lines)}</div>' if lines else ""


@dataclass(frozen=True, eq=False)
class Examples:
    """Example values that fill a form at a click, without asking the server.

    Attributes:
        dataset: The list of examples on the page.
        samples: The values of each example.
    """

    dataset: gr.Dataset
    samples: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, samples: Sequence[Sequence[Any]], labels: Sequence[str]) -> "Examples":
        """Shows examples under these labels."""
        hidden = [
            gr.Textbox(visible=False) if isinstance(value, str) else gr.Number(visible=False)
            for value in samples[0]
        ]
        dataset = gr.Dataset(
            components=hidden,
            samples=[list(sample) for sample in samples],
            sample_labels=list(labels),
            label="For example",
            elem_classes="examples",
        )
        return cls(dataset, samples)

    def wire(self, outputs: Sequence[Component], *more: Any) -> None:
        """Lets a click fill the outputs with the example's values, then with `more`."""
        js = f"index => [...{json.dumps(self.samples)}[index], ...{json.dumps(more)}]"
        self.dataset.click(None, self.dataset, list(outputs), js=js, **UNQUEUED)


# ---- fields of the settings


def add_presets(
    presets: Mapping[str, Iterable[int] | Callable[[gr.Request], dict[str, Any]]],
    strip: gr.HTML,
    value_of: Callable[[Iterable[int]], dict[str, Any]],
) -> None:
    """Adds one button per preset, which puts the preset's layers into a strip.

    Args:
        presets: The layers of each preset, or what makes the strip's value for a visitor, by the label of its
            button.
        strip: The strip of layers.
        value_of: Makes the strip's value from layers.
    """
    with gr.Row(elem_classes="presets"):
        for label, layers in presets.items():
            button = gr.Button(label, size="sm", min_width=60)
            value = layers if callable(layers) else partial(value_of, tuple(layers))
            button.click(value, None, strip, **UNQUEUED)


def size_and_seed_fields(studio: Studio, seed: int, has_size: bool = True) -> FormFields:
    """Makes fields for size, steps and seed, by the names of the settings; or without the size."""
    size = size_fields(studio) if has_size else {}
    steps = gr.Slider(
        1,
        studio.limits.steps,
        studio.defaults.num_steps,
        step=1,
        label="Steps",
        info="More are finer and take longer.",
    )
    number = gr.Number(seed, label="Seed", precision=0, info="The same seed repeats the image.")
    return {**size, "num_steps": steps, "seed": number}


def size_fields(studio: Studio) -> FormFields:
    """Makes fields for the size, by the names of the settings."""
    defaults, limits = studio.defaults, studio.limits
    with gr.Row():
        width = gr.Slider(SMALLEST, limits.side, defaults.width, step=16, label="Width", min_width=200)
        height = gr.Slider(SMALLEST, limits.side, defaults.height, step=16, label="Height", min_width=200)
    # The area is limited too: where one side grows too long, the other one yields.
    fitting = f"(moved, other) => Math.min(other, Math.floor({limits.area} / moved / 16) * 16)"
    width.input(None, [width, height], height, js=fitting, **UNQUEUED)
    height.input(None, [height, width], width, js=fitting, **UNQUEUED)
    with gr.Row(elem_classes="presets"):
        for label, ratio in SHAPES.items():
            shape = [round(studio.spec.size * side / 16) * 16 for side in (ratio**0.5, ratio**-0.5)]
            button = gr.Button(label, size="sm", min_width=48)
            button.click(None, None, [width, height], js=f"() => {shape}", **UNQUEUED)
    return {"width": width, "height": height}


def guidance_fields(studio: Studio) -> FormFields:
    """Makes fields for both kinds of guidance; distilled guidance is hidden if the model takes none."""
    distilled = studio.spec.params.guidance_embed
    return {
        "guidance": gr.Slider(
            0,
            max(10, 2 * studio.defaults.guidance),
            studio.defaults.guidance,
            step=0.1,
            label="Guidance",
            info=about("More follows the prompt more closely.", "guidance"),
            visible=distilled,
        ),
        "true_cfg": true_cfg_slider(studio),
        "negative_prompt": gr.Textbox(
            label="Negative prompt",
            info="What the image should not show. True CFG steers away from it.",
            max_length=studio.limits.letters,
        ),
    }


def true_cfg_slider(studio: Studio) -> gr.Slider:
    """Makes the slider of true CFG."""
    return gr.Slider(
        1,
        10,
        studio.defaults.true_cfg,
        step=0.1,
        label="True CFG",
        info=about("1 is off. More takes twice the time.", "guidance"),
    )


def wire_notes(fields: FormFields, notes_of: Callable[[Form], Mapping[str, str]]) -> None:
    """Says beside a field what is wrong with its value, or why it has no effect, whenever one changes.

    Args:
        fields: The components of a form. Those that have a line below their label show the notes there.
        notes_of: Finds what is to be said, by the names of the fields.
    """
    usual = {name: field.info for name, field in fields.items() if isinstance(field, FormComponent)}
    read = [name for name in fields if name != "mask"]  # no note is about it, and it is large

    def note(*values: Any) -> list[dict[str, Any]]:
        notes = notes_of(dict(zip(read, values, strict=True)))
        return [
            gr.update(info=f"**{html.escape(notes[name])}**" if name in notes else line or "")
            for name, line in usual.items()
        ]

    inputs: list[Any] = [fields[name] for name in read]
    gr.on(
        [field.change for field in inputs],
        note,
        inputs,
        [fields[name] for name in usual],
        trigger_mode="always_last",
        **UNQUEUED,
    )
