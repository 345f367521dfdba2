"""The tab that fills a mask, or continues an image beyond its edges, for models that take a masked image."""

from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.errors import InputError
from flux.images.io import thumbnail
from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.form_values import Form
from flux.studio.forms import MOST_OVERLAP, SIDES, borders_in, fill_settings
from flux.studio.painter import PNG, board, painted_mask, painter
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.fields import FormFields
from flux.studio.tabs.history import Files
from flux.studio.tabs.source import ImageSource
from flux.studio.tabs.steered import SteeredTab
from flux.studio.tabs.steering_image import ABOUT_MASK, mask_in
from flux.studio.viewer import pair
from flux.studio.widgets import UNQUEUED, Changes, held_image
from flux.studio.work.fill import before, frame, run_fill

PROMPT = "a dog wearing a top hat on the grass"  # of the image that small models begin with
MASK, AROUND = "Under a mask", "Around the image"


class FillTab(SteeredTab):
    """The tab that fills and continues images."""

    name = "fill"

    def __init__(self, studio: Studio, first: Path | None = None):
        """Add the tab. `first` is the image to fill at first."""
        super().__init__(studio)
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.source = ImageSource(studio, "Image", "fill-image", first)
                self.fields = {"fill": self.source.held, **self._where()}
                self.fields |= self.add_prompt(PROMPT if first else "", "What the whole image shows", "Fill")
            with gr.Column(elem_classes="outputs"):
                self.add_outputs("Add an image, paint over what is to be painted anew, and press Fill.")
            with gr.Column(elem_classes="options"):
                self.canvas = painter("fill-mask", first and board(first), ABOUT_MASK, is_open=True)
                self.painted_on = gr.State(first and str(first))  # the file of the image on the canvas
                self.fields |= {"mask": self.canvas, **self._borders(), **self.add_settings(False)}
        self._connect_images()

    def _where(self) -> FormFields:
        self.where = gr.Radio([MASK, AROUND], value=MASK, label="What is painted anew")
        return {"where": self.where}

    def _borders(self) -> FormFields:
        with gr.Column(visible=False) as self.borders:
            gr.Markdown("Borders, as shares of the image's sides.", elem_classes="label")
            values = {"left": 0.25, "right": 0.25, "above": 0.0, "below": 0.0}
            with gr.Row():
                sides: FormFields = {
                    side: gr.Slider(0, 1, values[side], step=0.05, label=side.capitalize(), min_width=150)
                    for side in SIDES
                }
            sides["overlap"] = gr.Slider(
                0,
                MOST_OVERLAP,
                0.05,
                step=0.01,
                label="Overlap",
                info="How far the image's own edge is painted anew, so that both blend.",
            )
            self.framed = gr.HTML("", visible=False, elem_id="fill-frame")
        return sides

    def _connect_images(self) -> None:
        """Let an image be painted on, and the new frame be seen before anything is drawn."""
        frame_fields = [self.source.held, self.where, *(self.fields[name] for name in (*SIDES, "overlap"))]

        def show(file: str | None, painted_on: str | None) -> Changes:
            if file == painted_on:  # an earlier run brought its mask with it
                return {self.painted_on: file}
            shown = board(thumbnail(held_image(file), 1024)) if file else None
            return {self.painted_on: file, self.canvas: shown}

        def show_frame(*values: Any) -> Any:
            names = ("fill", "where", *SIDES, "overlap")
            return self._frame(dict(zip(names, values, strict=True)))

        shown = [self.painted_on, self.canvas]
        self.source.held.change(show, [self.source.held, self.painted_on], shown, **UNQUEUED)
        hide_mask = f"document.querySelector('#fill-mask details').hidden = where === '{AROUND}'"
        self.where.change(
            lambda where: gr.update(visible=where == AROUND),
            self.where,
            self.borders,
            js=f"where => {{ {hide_mask}; return where; }}",
            **UNQUEUED,
        )
        moved = [field.change for field in frame_fields]  # pyright: ignore[reportAttributeAccessIssue]
        gr.on(moved, show_frame, frame_fields, self.framed, trigger_mode="always_last", **UNQUEUED)

    def _frame(self, form: Form) -> Any:
        """Draw the new frame, or hide it while there is none."""
        hidden = gr.update(visible=False)
        try:
            borders = borders_in(_with_word(form))
            if not form["fill"] or borders is None:
                return hidden
            image = held_image(form["fill"])
            small = image.resize(self.studio.limits.fill_size(image.size, borders))
            framed = thumbnail(frame(small, borders, form["overlap"]), 640)
            return gr.update(visible=True, value=_frame_html(framed))
        except InputError:  # the run says it
            return hidden

    @property
    def begun_with(self) -> list[Component]:
        """The components that `start_from` changes."""
        return [self.source.upload, self.source.held]

    def start_from(self, images: list[str]) -> Changes:
        """Make a file the image to fill, or take it away if there is none."""
        file = images[0] if images else None
        return {self.source.upload: file, self.source.held: file}

    def settings_of(self, form: Form) -> ResolvedGenerate:
        """Make the settings of a run. Raise InputError for values that cannot be used."""
        form = _with_word(form)
        if not form["fill"]:
            raise InputError("Got no image: upload the one that is to be filled")
        if not form["outpaint"] and "mask" in form:
            mask_in(form)
        return fill_settings(self.studio, form, held_image(form["fill"]).size)

    def work(
        self, session: Session, settings: ResolvedGenerate, form: Form
    ) -> Iterator[tuple[Update[MadeImage], Run]]:
        """Do the run."""
        mask = painted_mask(form["mask"]) if settings.outpaint is None else None
        return run_fill(self.studio, session, settings, held_image(form["fill"]), mask)

    def compared(self, run: Run, name: str) -> dict[str, Any]:
        """Make the viewer's value: an image of a run over what was filled."""
        image, mask = before(run)
        return pair(image, "before it was filled", run.images[name], run.captions[name], mask)

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        return [*super().restorable, self.painted_on, self.canvas]

    def restored_images(self, settings: GenerateSettings, files: Files) -> Changes:
        """Bring back the image, its mask or its borders."""
        image = files.one_of("fill")
        borders = settings.outpaint or (0.0, 0.0, 0.0, 0.0)
        values: Changes = {self.fields[side]: min(border, 1.0) for side, border in zip(SIDES, borders)}
        values[self.where] = MASK if settings.outpaint is None else AROUND
        values[self.painted_on] = image
        values[self.fields["overlap"]] = min(settings.overlap, MOST_OVERLAP)
        values[self.canvas] = board(thumbnail(held_image(image), 1024), files.mask) if image else None
        return {**values, **self.start_from([image] if image else [])}


def _frame_html(framed: Image.Image) -> str:
    file = BytesIO()
    framed.save(file, "PNG")
    address = f"{PNG}{b64encode(file.getvalue()).decode()}"
    caption = "<figcaption>The new frame: grey is painted anew.</figcaption>"
    return f'<figure><img src="{address}" alt="The image in its new frame">{caption}</figure>'


def _with_word(form: Form) -> dict[str, Any]:
    return {**form, "outpaint": form.get("where") == AROUND}
