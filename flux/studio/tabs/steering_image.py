"""The part of a tab that takes an image beside the prompt, for models that images steer.

It is a control image, an image to fill with its mask, or one to vary.
"""

from collections.abc import Mapping
from pathlib import Path

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.errors import InputError
from flux.images.io import thumbnail
from flux.images.sizes import natural_size
from flux.studio.form_values import MOST_STRENGTH, Form
from flux.studio.painter import board, painted_mask, painter
from flux.studio.state import Studio
from flux.studio.tabs.fields import SMALLEST, FormFields
from flux.studio.tabs.history import Files
from flux.studio.tabs.source import ImageSource
from flux.studio.widgets import UNQUEUED, Changes, held_image

LABELS = {
    "canny": "Image whose edges the result has",
    "depth": "Image whose depth the result has",
    "fill": "Image of which a part is painted anew",
    "redux": "Image to vary",
}
ABOUT_MASK = "Paint over what is painted anew. All other pixels stay exactly as they are."


class SteeringImage:
    """An image that steers a tab's runs. A model that needs none adds nothing.

    Attributes:
        fields: The components that a run's settings are read from, by name.
        canvas: Where the mask of an image to fill is painted. None for models without such images.
    """

    def __init__(self, studio: Studio, tab: str, first: Path | None = None):
        """Add the components.

        Args:
            studio: The studio.
            tab: The tab's name, with which the components' ids begin.
            first: The image that stands there at first. If None, there is none.
        """
        self._studio, self.fields = studio, FormFields()
        self.canvas: gr.HTML | None = None
        spec, kind = studio.spec, studio.spec.condition
        self._kind = kind if kind in ("control", "fill", "redux") else None
        if self._kind is None:
            return
        label = LABELS[spec.control or self._kind]
        self._source = ImageSource(studio, label, f"{tab}-{self._kind}", None if kind == "redux" else first)
        self.fields[self._kind] = self._source.held
        if kind == "redux":
            self.fields["redux_strength"] = gr.Slider(
                0,
                MOST_STRENGTH,
                1,
                step=0.05,
                label="Strength of the image",
                info="Below 1, the prompt counts for more.",
            )
        if kind == "fill":
            self.canvas = painter(f"{tab}-mask", first and board(first), ABOUT_MASK, is_open=True)
            self.fields["mask"] = self.canvas

    def connect(self, fields: FormFields) -> None:
        """Give a tab's images the size of the image, and let its mask be painted on it.

        Args:
            fields: The tab's fields, of which it changes "width" and "height".
        """
        if self._kind in (None, "redux"):
            return
        size = [fields["width"], fields["height"]]
        canvas = self.canvas

        def size_to(file: str | None) -> Changes:
            if file is None:
                return dict.fromkeys(size, gr.skip())
            image, limits = held_image(file), self._studio.limits
            if self._kind == "fill":
                sides = limits.fill_size(image.size)
            else:
                sides = natural_size(image, self._studio.spec.size)
            changes: Changes = dict(zip(size, (max(SMALLEST, side) for side in sides), strict=True))
            return changes | ({canvas: board(thumbnail(image, 1024))} if canvas else {})

        # Not `change`: an earlier run brings its own size and mask back.
        for event in self._source.given:
            event.success(size_to, self._source.held, [*size, *self._canvases], **UNQUEUED)

    def images(self, form: Form) -> dict[str, Image.Image]:
        """Read the images of a form, by the fields of settings that name them.

        Raises:
            InputError: The mask of an image to fill is missing, or an image has been deleted.
        """
        if self._kind is None or not form[self._kind]:
            return {}
        images = {self._kind: held_image(form[self._kind])}
        if self._kind == "fill":
            images["mask"] = mask_in(form)
        return images

    def check(self, form: Form) -> None:
        """Raise InputError if the image to fill has no mask."""
        if self._kind == "fill" and form[self._kind]:
            mask_in(form)

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` changes."""
        if self._kind is None:
            return []
        return [self._source.upload, self._source.held, *self._canvases]

    def restored(self, files: Files) -> Changes:
        """Bring back the images of a run."""
        if self._kind is None:
            return {}
        file = files.one_of(self._kind)
        changes: Changes = dict.fromkeys((self._source.upload, self._source.held), file)
        if self.canvas:
            changes[self.canvas] = board(thumbnail(held_image(file), 1024), files.mask) if file else None
        return changes

    def taken(self, files: Files) -> Changes:
        """Bring back the images of a run, if it began with any. Else what is there stays."""
        return self.restored(files) if self._kind and files.one_of(self._kind) else {}

    @property
    def _canvases(self) -> list[gr.HTML]:
        return [self.canvas] if self.canvas else []


def mask_in(form: Mapping[str, object]) -> Image.Image:
    """Take the mask of an image to fill from a form. Raise InputError if nothing is painted."""
    mask = painted_mask(form["mask"])
    if mask is None:
        raise InputError("Got no mask: open Mask, and paint over what is to be painted anew")
    return mask
