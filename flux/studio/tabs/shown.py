"""The buttons under an image that is shown: edit it, save it, repeat its run."""

from pathlib import Path

import gradio as gr
from gradio.components import Component

from flux.studio.repeat import as_command, as_python
from flux.studio.sessions import Run
from flux.studio.tabs.common import UNQUEUED
from flux.studio.widgets import Changes, download_button, downloadable


class ShownImage:
    """A row of buttons under an image. They are disabled as long as none is shown.

    Attributes:
        row: The row.
        edit: The button that edits the image.
        file: A state that holds the image's file, or None.
    """

    def __init__(
        self,
        label: str = "Image",
        run: Run | None = None,
        image: Path | None = None,
        further: str = "Edit this",
    ):
        """Adds the row. `run` and `image` are shown from the first moment on, if they are given.

        Args:
            label: The label of the button that saves the image.
            run: The run.
            image: Its image.
            further: The label of the button `edit`. If empty, the button is hidden.
        """
        texts, there = ("", ""), run is not None
        if run:
            texts = as_command(run.settings), as_python(run.settings)
        with gr.Row(elem_classes="save") as self.row:
            self.edit = gr.Button(
                further, size="sm", variant="primary", interactive=there, visible=bool(further)
            )
            self._save = download_button(label, image)
            self._record = download_button("run.json", run and run.record)
            self._copies = [
                gr.Button(f"Copy as {kind}", size="sm", interactive=there) for kind in ("command", "Python")
            ]
        self._texts = [gr.Textbox(text, visible="hidden", label="To copy") for text in texts]
        self.file = gr.State(image and str(image))
        for button, text in zip(self._copies, self._texts, strict=True):
            button.click(None, text, None, js="text => { studio.copy(text); }", **UNQUEUED)

    @property
    def components(self) -> list[Component]:
        """The components that `show` changes."""
        return [self.edit, self._save, self._record, *self._copies, *self._texts, self.file]

    def show(self, run: Run, image: Path, saved: Path | None = None) -> Changes:
        """Enables the buttons for an image of a run.

        Args:
            run: The run.
            image: The image's file.
            saved: The file to save. If None, the image.
        """
        texts = as_command(run.settings), as_python(run.settings)
        return {
            self.edit: gr.update(interactive=True),
            self._save: downloadable(saved or image),
            self._record: downloadable(run.record),
            **dict.fromkeys(self._copies, gr.update(interactive=True)),
            **dict(zip(self._texts, texts, strict=True)),
            self.file: str(image),
        }
