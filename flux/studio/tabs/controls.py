"""The buttons and lines that every tab has for its runs."""

from typing import Any

import gradio as gr

from flux.studio.state import Studio
from flux.studio.widgets import UNQUEUED, Changes, status_html


class RunControls:
    """The components that every tab has for its runs. Each is added where its method is called.

    Attributes:
        studio: The studio.
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
        self.studio, self.tab = studio, tab

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
        self.studio.line.stop(request.session_hash, self.tab)
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
