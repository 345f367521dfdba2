"""The tab that generates images."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.engine import MadeImage, Update
from flux.studio.forms import SAMPLING, Form, generate_settings
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.common import (
    Examples,
    FormFields,
    RunButton,
    RunControls,
    guidance_fields,
    size_and_seed_fields,
)
from flux.studio.tabs.history import History
from flux.studio.widgets import (
    Changes,
    download_button,
    downloadable,
    held_image,
    image_input,
    stage,
    status_html,
)
from flux.studio.work.generate import run_generate

EXAMPLES = {
    "flux-nano": [
        ("a dog wearing a top hat on the grass", 7),
        ("an owl in the forest", 4),
        ("a red car on the street", 3),
        ("a penguin in front of mountains", 5),
    ],
    "": [
        ("a red fox curled up asleep on mossy roots in an old beech wood, soft light after rain", 1001),
        ("a lone lighthouse on black basalt cliffs with a storm rolling in, long exposure", 1003),
        ("a steam locomotive crossing a stone viaduct in autumn woodland, aerial photograph", 1021),
    ],
}


class GenerateTab:
    """The tab that generates images.

    Attributes:
        fields: The components that a run's settings are read from, by name.
    """

    def __init__(self, studio: Studio):
        self.studio, self.controls = studio, RunControls(studio, "generate")
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.prompt = gr.Textbox(
                    label="Prompt",
                    lines=1,
                    max_lines=6,
                    max_length=studio.limits.letters,
                    autofocus=True,
                    placeholder="What should the image show?",
                    elem_id="generate-prompt",
                    info="Enter draws it.",
                )
                [self.go] = self.controls.add_buttons("Draw")
                samples = EXAMPLES.get(studio.defaults.model, EXAMPLES[""])
                self.examples = Examples.of(samples, [prompt for prompt, _ in samples])
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status()
                self.stage = stage("Image", "Your image appears here.", "generate-stage")
                with gr.Row(elem_classes="save"):
                    self.png, self.record = download_button("Image"), download_button("run.json")
            with gr.Column(elem_classes="options"):
                self.fields = {"prompt": self.prompt, **self._settings(), **self._start_image()}

    def _settings(self) -> FormFields:
        with gr.Accordion("Settings", open=False, elem_id="generate-settings"):
            fields = size_and_seed_fields(self.studio, seed=0)
            fields["count"] = gr.Slider(1, self.studio.limits.images, 1, step=1, label="Images")
            self.new_seed = gr.Checkbox(False, label="A new seed each time")
            return fields | guidance_fields(self.studio)

    def _start_image(self) -> FormFields:
        with gr.Accordion("Start from an image", open=False, elem_id="generate-start"):
            self.upload, image = image_input(self.studio, label="Image", elem_id="generate-image")
            strength = gr.Slider(
                0.05, 1, 0.8, step=0.05, label="Strength", info="1 keeps nothing of the image"
            )
        return {"image": image, "strength": strength}

    def wire(self, history: History) -> None:
        """Connects the events; `history` shows each new image."""
        self.controls.wire_stop()

        def settings_of(form: Form) -> ResolvedGenerate:
            return generate_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedGenerate, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            image = held_image(form["image"]) if form["image"] else None
            for update, run in run_generate(self.studio, session, settings, image):
                shown: Changes = {self.stage: update.preview} if update.preview else {}
                if update.result:
                    shown = self._shown(run, update.result.name) | history.changes(session)
                yield update, shown

        seed = self.fields["seed"]
        run = RunButton(self.studio, self.controls, self.fields, settings_of, work)
        outputs = [self.stage, self.png, self.record, history.gallery]
        run.wire([self.go.click, self.prompt.submit], outputs, new_seed=(self.new_seed, seed))
        self.examples.wire([self.prompt, seed, self.new_seed], False)

    def _shown(self, run: Run, name: str) -> Changes:
        path = run.images[name]
        return {self.stage: str(path), self.png: downloadable(path), self.record: downloadable(run.record)}

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        shown = [self.stage, self.png, self.record, self.controls.status]
        return [self.new_seed, self.upload, *self.fields.values(), *shown]

    def restored(self, settings: GenerateSettings, about: Mapping[str, Any], upload: Path | None) -> Changes:
        """Fills the form as for one image of these settings, or for all if `about` names none."""
        first, image = settings.prompts[0], upload and str(upload)
        values = {name: getattr(settings, name) for name in (*SAMPLING, "strength")}
        values["prompt"] = about.get("prompt", first.prompt)
        values["seed"] = about.get("seed", first.seed)
        values["count"] = 1 if "prompt" in about else len(settings.prompts)
        values["image"] = image
        filled = {self.fields[name]: value for name, value in values.items()}
        return {self.new_seed: False, self.upload: image, **filled}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Shows an image of this session once more."""
        return {**self._shown(run, name), self.controls.status: status_html("From this session.")}
