"""The images of the Edit tab: an edit over its reference, all images of the run, and buttons to go on."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.images.io import read_image, thumbnail
from flux.studio.painter import board
from flux.studio.sessions import Run
from flux.studio.tabs.shown import ShownImage
from flux.studio.viewer import image_alone, pair, viewer
from flux.studio.visits import shown_run
from flux.studio.widgets import CONCURRENT, Changes, preview, results
from flux.studio.work.edit import FOUND_MASK

EXAMPLE_EDIT = "edit_0"


class EditsShown:
    """The viewer of an edit, the buttons under it, and the gallery of its run."""

    def __init__(self, example: Run):
        """Add the components. They show an edit of `example` at first."""
        self._preview = preview("edit-preview")
        self._viewer = viewer("edit-viewer", _pair(example, EXAMPLE_EDIT))
        self._under = ShownImage(run=example, image=example.images[EXAMPLE_EDIT])
        with self._under.row:
            self._correct = gr.Button("Correct its mask", size="sm", elem_id="edit-correct")
        self._gallery = results(
            "Edits",
            "edit-gallery",
            visible=True,
            value=_images(example),
            selected_index=list(example.images).index(EXAMPLE_EDIT),
        )
        # The folder of the run that is shown, and the name of its image.
        self._folder, self._chosen = gr.State(str(example.folder)), gr.State(EXAMPLE_EDIT)

    @property
    def components(self) -> list[Component]:
        """The components that `show`, `show_alone` and `show_preview` change."""
        return [self._preview, self._gallery, self._folder, *self._chosen_parts]

    def show(self, run: Run, name: str) -> Changes:
        """Show an image of a run over its reference, and all images of the run."""
        at = list(run.images).index(name)
        return {
            **self._choose(run, name),
            self._preview: gr.update(visible=False),
            self._gallery: gr.update(visible=True, value=_images(run), selected_index=at),
            self._folder: str(run.folder),
        }

    def show_alone(self, path: Path, shows: str) -> Changes:
        """Show an image that is not a run's of this tab, and say what it shows."""
        hidden = (self._preview, self._correct, self._gallery)
        return {
            self._viewer: image_alone(path, shows),
            **{part: gr.update(visible=False) for part in hidden},
        }

    def show_preview(self, image: Image.Image | None) -> Changes:
        """Show an image that is not saved, such as a step's, or change nothing if there is none."""
        if image is None:
            return {}
        hidden = (self._correct, self._gallery)
        return {
            self._preview: gr.update(visible=True, value=image),
            **{part: gr.update(visible=False) for part in hidden},
        }

    def connect(self, edits: Component, canvas: gr.HTML) -> None:
        """Let a click show another image, a further turn follow it, and its mask be corrected.

        Args:
            edits: Where the edits of the next run are written.
            canvas: Where its mask is painted.
        """

        def choose(folder: str, event: gr.SelectData) -> Changes:
            run = shown_run(folder)
            return self._choose(run, list(run.images)[event.index])

        def go_on(folder: str, chosen: str, text: str) -> str:
            lines, caption = (text or "").splitlines(), shown_run(folder).captions[chosen]
            if chosen == "reference":
                return "\n".join([*lines, caption])
            prompts = [line.lstrip("> ").strip() for line in lines]
            place = prompts.index(caption) + 1 if caption in prompts else len(lines)
            return "\n".join([*lines[:place], f"> {caption}", *lines[place:]])

        def correct(folder: str, chosen: str) -> Changes:
            run = shown_run(folder)
            mask = mask_of(run, chosen)
            image = thumbnail(read_image(run.images["reference"]), 1024)
            return {canvas: board(image, mask and Image.open(mask))}

        at = [self._folder, self._chosen]
        self._gallery.select(choose, self._folder, self._chosen_parts, **CONCURRENT)
        further = self._under.edit.click(go_on, [*at, edits], edits, **CONCURRENT)
        further.success(None, None, None, js="() => studio.focus('#edit-edits textarea')")
        shown = self._correct.click(correct, at, canvas, **CONCURRENT)
        shown.success(None, None, None, js="() => studio.unfold('#edit-mask')")

    @property
    def _chosen_parts(self) -> list[Component]:
        return [self._viewer, self._correct, *self._under.components, self._chosen]

    def _choose(self, run: Run, name: str) -> Changes:
        """Show an image of the run that the gallery shows."""
        return {
            self._viewer: _pair(run, name),
            # A run disables the buttons of what is shown.
            self._correct: gr.update(visible=mask_of(run, name) is not None, interactive=True),
            **self._under.show(run, run.images[name]),
            self._chosen: name,
        }


def mask_of(run: Run, name: str) -> Path | None:
    """Return the file of the mask that was painted or found for an edit, or None if there is none."""
    files = (run.folder / "mask.png", run.folder / FOUND_MASK.format(name))
    return next((file for file in files if file.is_file()), None) if name != "reference" else None


def _images(run: Run) -> list[tuple[str, str]]:
    return [(str(path), run.captions[name]) for name, path in run.images.items()]


def _pair(run: Run, name: str) -> dict[str, Any]:
    """Make the viewer's value: an edit over its reference, or the reference alone."""
    if name == "reference":
        return image_alone(run.images[name], run.captions[name])
    before, after = ((run.images[each], run.captions[each]) for each in ("reference", name))
    return pair(*before, *after, mask_of(run, name))
