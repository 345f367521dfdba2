"""A run as a tab shows it: its steps, its images, and the buttons under an image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.studio.progress import MadeImage, Update
from flux.studio.repeat import as_command, as_python
from flux.studio.sessions import Run
from flux.studio.viewer import viewer
from flux.studio.visits import existing_file, shown_run
from flux.studio.widgets import CONCURRENT, UNQUEUED, Changes, download_button, downloadable, preview, results


class ShownImage:
    """A row of buttons under an image. They are disabled as long as none is shown.

    Attributes:
        row: The row.
        edit: The button that edits the image.
        file: A state that holds the image's file, or None.
    """

    def __init__(
        self,
        saves: str = "image",
        run: Run | None = None,
        image: Path | None = None,
        further: str = "Edit this",
    ):
        """Add the row. `run` and `image` are shown from the first moment on, if they are given.

        Args:
            saves: What the button that saves is for.
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
            self._save = download_button(f"Save {saves}", image)
            self._record = download_button("Save run.json", run and run.record)
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
        """Enable the buttons for an image of a run.

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


class ShownRun:
    """The steps of a run, then one of its images with buttons under it, and all of them to choose from.

    Attributes:
        under: The buttons.
    """

    def __init__(
        self,
        name: str,
        viewed: Callable[[Run, str], dict[str, Any]],
        first: Any = None,
        placeholder: str = "",
        columns: int = 4,
        **under: Any,
    ):
        """Add the components.

        Args:
            name: The tab's name, with which the components' ids begin.
            viewed: Makes the viewer's value for an image of a run, see `flux.studio.viewer`.
            first: The viewer's value before the first run.
            placeholder: The text that stands there if that is None.
            columns: Number of columns of the images to choose from.
            under: Arguments of `ShownImage`.
        """
        self._viewed = viewed
        self._preview = preview(f"{name}-preview")
        self._viewer = viewer(f"{name}-stage", first, placeholder)
        self.under = ShownImage(**under)
        self._gallery = results("Images of this run", f"{name}-gallery", columns=columns)

        def choose(file: str, event: gr.SelectData) -> Changes:
            run = shown_run(existing_file(file).parent)
            return self._choose(run, list(run.images)[event.index])

        chosen = [self._viewer, *self.under.components]
        self._gallery.select(choose, self.under.file, chosen, **CONCURRENT)

    @property
    def components(self) -> list[Component]:
        """The components that `show` and `follow` change."""
        return [self._preview, self._viewer, self._gallery, *self.under.components]

    def follow(self, update: Update[MadeImage], run: Run) -> Changes:
        """Show a step of a run, or the image that is made."""
        if update.result:
            return self.show(run, update.result.name)
        return {self._preview: gr.update(visible=True, value=update.preview)} if update.preview else {}

    def show(self, run: Run, name: str) -> Changes:
        """Show an image of a run, and all of them if there are several."""
        images = [(str(path), run.captions[each]) for each, path in run.images.items()]
        at = list(run.images).index(name)
        return {
            self._preview: gr.update(visible=False),
            self._gallery: gr.update(value=images, visible=len(images) > 1, selected_index=at),
            **self._choose(run, name),
        }

    def _choose(self, run: Run, name: str) -> Changes:
        return {self._viewer: self._viewed(run, name), **self.under.show(run, run.images[name])}
