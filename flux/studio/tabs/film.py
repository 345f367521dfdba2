"""The tab that shows the steps of an image as a film, and what its layers attend to."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.settings.demos import LayerSettings
from flux.settings.resolved import ResolvedLayer
from flux.studio.form_values import Form
from flux.studio.forms import film_settings, notes_about
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.strip import layer_strip, strip_value
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import (
    FormFields,
    connect_notes,
    filled,
    guidance_fields,
    prompt_field,
    sampling_values,
    size_and_seed_fields,
)
from flux.studio.tabs.history import Files, History
from flux.studio.tabs.runs import RunButton
from flux.studio.tabs.shown import ShownImage
from flux.studio.tabs.steering_image import SteeringImage
from flux.studio.viewer import image_alone, viewer
from flux.studio.widgets import Changes, preview, results
from flux.studio.words import about
from flux.studio.work.film import run_film
from flux.studio.work.generate import steering_images

PROMPT = "a cat wearing a top hat in the snow"
IMAGE = "picture"  # the name of a film's last image
SHEETS = {"steps": "Every step", "layers": "Attention to the text", "words": "Attention of words"}


class FilmTab:
    """The tab that shows the steps of an image as a film.

    Attributes:
        fields: The components that a run's settings are read from, by name.
    """

    def __init__(self, studio: Studio, first: Path | None = None):
        """Add the tab. `first` is the image that steers a run at first, for models that need one."""
        self.studio, self.controls = studio, RunControls(studio, "film")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.steering = SteeringImage(studio, "film", first)
                self.prompt = prompt_field(studio, "film", PROMPT)
                [self.go] = self.controls.add_buttons("Watch")
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status()
                self.preview = preview("film-preview")
                self.viewer = viewer("film-stage", None, "The film of the image's steps plays here.")
                self.sheets = results("Sheets", "film-sheets", columns=3, object_fit="contain", zoomable=True)
                self.under = ShownImage("film")
            with gr.Column(elem_classes="options"):
                self.fields = {"prompt": self.prompt, **self.steering.fields, **self._options()}

    def _options(self) -> FormFields:
        params = self.studio.spec.params
        gr.Markdown(about("Layers whose attention is shown.", "layers"), elem_classes="label")
        middle = params.depth + params.depth_single_blocks // 2
        strip = layer_strip(strip_value(self.studio, [1, middle]), elem_id="film-layers")
        words = gr.Textbox(
            label="Words to look at", info="Separated by commas. If empty, every word of the prompt."
        )
        with gr.Accordion("Settings", open=False, elem_id="film-settings"):
            fields = size_and_seed_fields(self.studio, seed=3)
            return {"layers": strip, "words": words, **fields, **guidance_fields(self.studio)}

    def connect(self, history: History) -> None:
        """Connect the events; `history` shows each new image."""
        self.steering.connect(self.fields)

        def settings_of(form: Form) -> ResolvedLayer:
            self.steering.check(form)
            return film_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedLayer, form: Form
        ) -> Iterator[tuple[Update[MadeImage | Path], Changes]]:
            steering = steering_images(settings, self.steering.images(form))
            for update, run in run_film(self.studio, session, settings, steering):
                shown: Changes = {}
                if update.preview:
                    shown = {self.preview: gr.update(visible=True, value=update.preview)}
                elif update.result:
                    shown = self.shown_again(run, IMAGE)
                yield update, shown

        watch = RunButton(self.controls, self.fields, settings_of, work, history)
        watch.connect([self.go.click, self.prompt.submit], self._shown_parts)
        connect_notes(self.fields, partial(notes_about, self.studio, film_settings))

    @property
    def _shown_parts(self) -> list[Component]:
        return [self.preview, self.viewer, self.sheets, *self.under.components]

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = dict.fromkeys([*self.steering.restorable, *self.fields.values()])
        return [*form, *self._shown_parts]

    def restored(self, settings: LayerSettings, details: Mapping[str, Any], files: Files) -> Changes:  # noqa: ARG002 - a run has one image
        """Fill the form with these settings."""
        entry = settings.prompts[0]
        values = sampling_values(self.studio, settings)
        existing = [layer for layer in settings.layers if layer < self.studio.spec.num_layers]
        values |= {"prompt": entry.prompt, "seed": entry.seed, "words": ", ".join(settings.words)}
        values["layers"] = strip_value(self.studio, existing)
        return {**filled(self.fields, values), **self.steering.restored(files)}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Show a film of this session with its sheets, or its image as long as there is no film."""
        film, image = run.folder / "film.webp", run.images[name]
        shown = film if film.is_file() else image
        files = [(run.folder / f"{sheet}.png", title) for sheet, title in SHEETS.items()]
        sheets = [(str(file), title) for file, title in files if file.is_file()]
        return {
            self.preview: gr.update(visible=False),
            self.viewer: image_alone(shown, run.captions[name]),
            self.sheets: gr.update(value=sheets, visible=bool(sheets)),
            **self.under.show(run, image, saved=shown),
        }
