"""The part of the Edit tab in which a mask is painted."""

from pathlib import Path

import gradio as gr
from PIL import Image

from flux.studio.painter import board, painter
from flux.studio.widgets import Changes

ABOUT = """Paint where the edit may change the reference. If nothing is painted, the dose auto finds a mask by
itself; with any other dose the whole image may change. <a href="#word-mask">Mask?</a>"""


class MaskCanvas:
    """A fold with an image to paint a mask on.

    Attributes:
        painter: The board, whose value `flux.studio.painter.painted_mask` reads.
    """

    def __init__(
        self, image: Path | None, elem_id: str = "edit-mask", about: str = ABOUT, is_open: bool = False
    ):
        """Add the board.

        Args:
            image: The file of the image to paint on. If None, there is none yet.
            elem_id: The element's id.
            about: What is said above the board, in HTML.
            is_open: Whether the fold is open at first.
        """
        self.painter = painter(elem_id, image and board(image), about, is_open)

    @property
    def components(self) -> list[gr.HTML]:
        """The components that `show` and `clear` change."""
        return [self.painter]

    def show(self, image: Image.Image | Path, mask: Image.Image | None = None) -> Changes:
        """Replace the image to paint on, and what is painted.

        Args:
            image: The image to paint on, or its file.
            mask: White where it is painted already. If None, nothing is.
        """
        return {self.painter: board(image, mask)}

    def clear(self) -> Changes:
        """Remove the image to paint on."""
        return {self.painter: None}
