"""A place for an image that a run begins with: an upload, or one of this visit's images."""

from pathlib import Path

import gradio as gr

from flux.errors import InputError
from flux.studio.state import Studio
from flux.studio.widgets import CONCURRENT, UNQUEUED, image_input, results


class ImageSource:
    """An upload, and below it a fold with this visit's images to take one from.

    Attributes:
        upload: The upload.
        held: A state that holds the file of the image, or None. Its `change` is the event to follow.
        given: The events by which a visitor gives an image. An earlier run that comes back is none.
    """

    def __init__(self, studio: Studio, label: str, elem_id: str, first: Path | None = None):
        self.upload, self.held, uploaded = image_input(studio, first, label=label, elem_id=elem_id)
        with gr.Accordion("Take one of your images", open=False, elem_id=f"{elem_id}-taken") as fold:
            gallery = results("Your images, to take one", f"{elem_id}-visit", columns=5)
            nothing = gr.Markdown("There is none yet.", elem_classes="label")
        files = gr.State([])

        def list_images(request: gr.Request) -> tuple:
            session = studio.sessions.of(request.session_hash)
            images = [(str(path), run.captions[name]) for run, name, path in session.images()]
            shown = gr.update(value=images, visible=bool(images))
            return shown, gr.update(visible=not images), [path for path, _ in images]

        def take(files: list[str], event: gr.SelectData) -> tuple[str, str]:
            if event.index >= len(files):
                raise InputError("That image is gone: open this fold again")
            return files[event.index], files[event.index]

        fold.expand(list_images, None, [gallery, nothing, files], **UNQUEUED)
        taken = gallery.select(take, files, [self.upload, self.held], **CONCURRENT)
        self.given = (uploaded, taken)
