"""The tab that shows the steps of an image as a film, and what its layers attend to."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.settings.demos import LayerSettings
from flux.settings.resolved import ResolvedLayer
from flux.studio.engine import MadeImage, Update
from flux.studio.forms import SAMPLING, Form, film_settings
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.common import (
    FormFields,
    RunButton,
    RunControls,
    size_and_seed_fields,
    true_cfg_slider,
)
from flux.studio.tabs.history import History
from flux.studio.widgets import (
    Changes,
    download_button,
    downloadable,
    layer_strip,
    results,
    stage,
    status_html,
    strip_value,
)
from flux.studio.work.film import run_film

PROMPT = "a cat wearing a top hat in the snow"
SHEETS = {"steps": "Every step", "layers": "Attention to the text", "words": "Attention of words"}


class FilmTab:
    """The tab that shows the steps of an image as a film.

    Attributes:
        fields: The components that a run's settings are read from, by name.
    """

    def __init__(self, studio: Studio):
        self.studio, self.controls = studio, RunControls(studio, "film")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.prompt = gr.Textbox(
                    PROMPT,
                    label="Prompt",
                    elem_id="film-prompt",
                    lines=1,
                    max_lines=6,
                    max_length=studio.limits.letters,
                )
                [self.go] = self.controls.add_buttons("Watch")
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status()
                self.film = stage("Film", "The film of the image's steps plays here.", "film-stage")
                self.sheets = results(
                    "Sheets", "film-sheets", columns=3, preview=True, object_fit="contain", fullscreen=True
                )
                with gr.Row(elem_classes="save"):
                    self.save, self.record = download_button("Film"), download_button("run.json")
            with gr.Column(elem_classes="options"):
                self.fields = {"prompt": self.prompt, **self._options()}

    def _options(self) -> FormFields:
        params = self.studio.spec.params
        gr.Markdown("Layers whose attention is shown", elem_classes="label")
        middle = params.depth + params.depth_single_blocks // 2
        strip = layer_strip(strip_value(self.studio, [1, middle]), elem_id="film-layers")
        words = gr.Textbox(
            label="Words to look at", info="Separated by commas. If empty, every word of the prompt."
        )
        with gr.Accordion("Settings", open=False, elem_id="film-settings"):
            fields = size_and_seed_fields(self.studio, seed=3)
            return {"layers": strip, "words": words, **fields, "true_cfg": true_cfg_slider(self.studio)}

    def wire(self, history: History) -> None:
        """Connects the events; `history` shows each new image."""
        self.controls.wire_stop()

        def settings_of(form: Form) -> ResolvedLayer:
            return film_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedLayer, _: Form
        ) -> Iterator[tuple[Update[MadeImage | Path], Changes]]:
            sheets: list[tuple[str, str]] = []
            for update, run in run_film(self.studio, session, settings):
                made = update.result
                shown: Changes = {}
                if update.preview:
                    shown = {self.film: update.preview}
                elif isinstance(made, MadeImage):
                    shown = {self.film: made.image, **history.changes(session)}
                elif made and made.stem in SHEETS:
                    sheets.append((str(made), SHEETS[made.stem]))
                    shown = {self.sheets: gr.update(value=sheets, visible=True)}
                elif made:
                    shown = {self.film: str(made), self.save: downloadable(made)}
                    shown[self.record] = downloadable(run.record)
                yield update, shown

        watch = RunButton(self.studio, self.controls, self.fields, settings_of, work)
        outputs = [self.film, self.save, self.record, self.sheets, history.gallery]
        watch.wire([self.go.click, self.prompt.submit], outputs)

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        return [*self.fields.values(), self.film, self.record, self.controls.status]

    def restored(self, settings: LayerSettings, about: Mapping[str, Any], upload: Path | None) -> Changes:  # noqa: ARG002 - a film begins with no upload
        """Fills the form with these settings."""
        entry = settings.prompts[0]
        values = {name: getattr(settings, name) for name in SAMPLING if name in self.fields}
        existing = [layer for layer in settings.layers if layer < self.studio.spec.num_layers]
        values |= {"prompt": entry.prompt, "seed": entry.seed, "words": ", ".join(settings.words)}
        values["layers"] = strip_value(self.studio, existing)
        return {self.fields[name]: value for name, value in values.items()}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Shows a film of this session once more, or its image if the film was not finished."""
        film = run.folder / "film.webp"
        return {
            self.film: str(film if film.is_file() else run.images[name]),
            self.record: downloadable(run.record),
            self.controls.status: status_html("From this session."),
        }
