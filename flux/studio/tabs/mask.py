"""The canvas on which a mask is painted."""

from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.studio.tabs.common import UNQUEUED
from flux.studio.widgets import Changes, mask_editor


class MaskCanvas:
    """An accordion with an image to paint a mask on.

    A closed editor cannot take an image, so the image waits in a state until the accordion opens.

    Attributes:
        editor: The editor, whose value `flux.studio.widgets.painted_mask` reads.
    """

    def __init__(self):
        with gr.Accordion("Mask", open=False, elem_id="edit-mask") as self._accordion:
            gr.Markdown(
                "Paint where the edit may change the reference. If nothing is painted, the dose auto finds "
                "a mask by itself; with any other dose the whole image may change.",
                elem_classes="label",
            )
            self.editor = mask_editor(
                label="Paint where the edit may change the reference", elem_id="edit-canvas", height=420
            )
        self._image, self._shown = gr.State(None), gr.State(None)

    @property
    def components(self) -> list[Component]:
        """The components that `show` and `clear` change."""
        return [self.editor, self._image, self._shown]

    def show(self, image: Image.Image) -> Changes:
        """Replaces the image to paint on."""
        return {self.editor: _unpainted(image), self._image: image, self._shown: None}

    def clear(self) -> Changes:
        """Removes the image to paint on."""
        return dict.fromkeys(self.components)

    def wire(self) -> None:
        """Puts the waiting image into the editor when the accordion opens."""

        def opened(image: Image.Image | None, shown: Image.Image | None) -> tuple[Any, Any]:
            if image is None or shown is image:
                return gr.skip(), gr.skip()
            return _unpainted(image), image

        self._accordion.expand(opened, [self._image, self._shown], [self.editor, self._shown], **UNQUEUED)


def _unpainted(image: Image.Image) -> dict[str, Any]:
    return {"background": image, "layers": [], "composite": None}
