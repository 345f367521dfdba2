"""A run of a tab, from click to end: how its form is read, and how its progress is shown."""

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
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import FormFields
from flux.studio.tabs.history import History
from flux.studio.widgets import CONCURRENT, UNLISTED, UNQUEUED, Changes, duration, status_html
from flux.vocabulary import unknown_words

S = TypeVar("S", bound=ModelSettings)


@dataclass(frozen=True, eq=False)
class RunButton(Generic[S]):
    """A button that starts a run from a form's values.

    Attributes:
        controls: The tab's buttons, status line and note.
        fields: The components whose values make the form.
        settings_of: Makes the run's settings from the form. Raises InputError if they cannot be used.
        work: Called when the model is free. Yields updates with what they change on the page.
        history: Shows each new image, too. If None, the run's results are no images of the visit.
        buttons: The buttons that save what it makes, or go on from it.
    """

    controls: RunControls
    fields: FormFields
    settings_of: Callable[[Form], S]
    work: Callable[[Session, S, Form], Iterator[tuple[Update, Changes]]]
    history: History | None = None
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
        shown = [self.history.gallery] if self.history else []
        changed = [controls.status, *controls.buttons, *outputs, *shown]
        self.buttons.extend(part for part in outputs if isinstance(part, gr.Button | gr.DownloadButton))
        begun.success(self.run, inputs, changed, concurrency_limit=None, **UNLISTED)

    def begin(self, request: gr.Request, *values: Any) -> Changes:
        """Check the form, before the run waits for the model."""
        studio = self.controls.studio
        unknown = words_note(studio, self.settings_of(self._form(values)))
        if studio.line.has(request.session_hash, self.controls.tab):  # Enter was pressed in a prompt
            return {self.controls.status: gr.skip()}
        waiting = status_html(Update("waiting for the model"))
        return {self.controls.words: unknown, self.controls.status: waiting, **self.controls.switched(True)}

    def run(self, request: gr.Request, *values: Any) -> Iterator[Changes]:
        """Do the work when its turn comes, and show its progress."""
        caller, tab, status = request.session_hash, self.controls.tab, self.controls.status
        studio = self.controls.studio
        if studio.line.has(caller, tab):  # "Edit" was clicked twice
            yield {status: gr.skip()}
            return
        begin, form = time.perf_counter(), self._form(values)
        finished, last = Changes(), Changes()  # what all results changed, and what the last one did
        # A preview of this run stands in the place of an earlier image, which must not be saved for it.
        unsaved: Changes = {button: gr.update(interactive=False) for button in self.buttons}
        try:
            with studio.turn(caller, tab) as (job, session, waiting):
                for update in waiting:
                    yield {status: status_html(update)}
                if not job.stop.is_set():
                    begin = time.perf_counter()
                    yield unsaved or {status: gr.skip()}
                    for update, changes in self.work(session, self.settings_of(form), form):
                        if update.result is not None:
                            changes |= self.history.changes(session) if self.history else {}
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
