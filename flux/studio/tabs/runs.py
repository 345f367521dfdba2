"""A run of a tab, from click to end: its buttons, its progress, and how its form is read."""

import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import gradio as gr
from gradio.components import Component

from flux.settings.demos import ModelSettings
from flux.studio.form_values import Form
from flux.studio.forms import texts_in, unseen_words
from flux.studio.progress import Update
from flux.studio.sessions import Session
from flux.studio.state import Studio
from flux.studio.tabs.fields import FormFields
from flux.studio.widgets import CONCURRENT, UNLISTED, UNQUEUED, Changes, duration, status_html
from flux.vocabulary import unknown_words

S = TypeVar("S", bound=ModelSettings)


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
        """Add the note, hidden as long as all words are known, then buttons to start and one to stop.

        Returns:
            The buttons that start a run, the main one first.
        """
        self.words = gr.HTML("", elem_classes="words")
        with gr.Row(elem_classes="actions"):
            self.start = [gr.Button(label, variant="primary", elem_id=f"{self.tab}-go")]
            self.start += [gr.Button(other, elem_id=f"{self.tab}-{other.lower()}") for other in more]
            self.stop = gr.Button("Stop", interactive=False, elem_id=f"{self.tab}-stop")
        self.stop.click(self.cancel, None, self.stop, **UNQUEUED)
        return self.start

    def cancel(self, request: gr.Request) -> dict[str, Any]:
        """Cancel the session's run of this tab."""
        self._studio.line.stop(request.session_hash, self.tab)
        return gr.update(interactive=False)

    def add_status(self, text: str = "Ready.") -> None:
        """Add the status line."""
        self.status = gr.HTML(status_html(text), elem_id=f"{self.tab}-status")

    @property
    def buttons(self) -> list[gr.Button]:
        """All buttons."""
        return [*self.start, self.stop]

    def switched(self, running: bool) -> Changes:
        """Enable the buttons that start a run, or while one is in progress the one that stops it."""
        starting = {button: gr.update(interactive=not running) for button in self.start}
        return {**starting, self.stop: gr.update(interactive=running)}


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

    def connect(
        self,
        triggers: Sequence[Callable[..., Any]],
        outputs: Sequence[Component],
        new_seed: tuple[gr.Checkbox, gr.Number] | None = None,
    ) -> None:
        """Let events start a run.

        Args:
            triggers: The events, such as `button.click`.
            outputs: The components that `work` changes.
            new_seed: Whether to draw a new seed first, and where it goes.
        """
        controls, inputs = self.controls, list(self.fields.values())
        lines = [controls.words, controls.status, *controls.buttons]
        if new_seed:
            drawn = "(isNew, seed) => (isNew ? Math.floor(Math.random() * 2 ** 32) : seed)"
            seeded = gr.on(list(triggers), None, [*new_seed], new_seed[1], js=drawn, **UNQUEUED)
            begun = seeded.then(self.begin, inputs, lines, **CONCURRENT)
        else:
            begun = gr.on(list(triggers), self.begin, inputs, lines, **CONCURRENT)
        changed = [controls.status, *controls.buttons, *outputs]
        self.buttons.extend(part for part in outputs if isinstance(part, gr.Button | gr.DownloadButton))
        begun.success(self.run, inputs, changed, concurrency_limit=None, **UNLISTED)

    def begin(self, request: gr.Request, *values: Any) -> Changes:
        """Check the form, before the run waits for the model."""
        unknown = words_note(self.studio, self.settings_of(self._form(values)))
        if self.studio.line.has(request.session_hash, self.controls.tab):  # Enter was pressed in a prompt
            return {self.controls.status: gr.skip()}
        waiting = status_html(Update("waiting for the model"))
        return {self.controls.words: unknown, self.controls.status: waiting, **self.controls.switched(True)}

    def run(self, request: gr.Request, *values: Any) -> Iterator[Changes]:
        """Do the work when its turn comes, and show its progress."""
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


def words_note(studio: Studio, settings: ModelSettings) -> str:
    """Render the words of these settings that the model was not trained on, or do not see."""
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
