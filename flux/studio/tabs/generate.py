"""The tab that generates images."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.images.sizes import natural_size
from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.engine import MadeImage, Update
from flux.studio.forms import MOST_STRENGTH, SAMPLING, Form, generate_settings, notes_about
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.common import (
    SMALLEST,
    UNQUEUED,
    Examples,
    FormFields,
    RunButton,
    RunControls,
    guidance_fields,
    size_and_seed_fields,
    wire_notes,
)
from flux.studio.tabs.history import Files, History
from flux.studio.tabs.shown import ShownRun
from flux.studio.tabs.source import ImageSource
from flux.studio.viewer import image_alone
from flux.studio.widgets import Changes, held_image, image_input, status_html
from flux.studio.work.generate import run_generate, steering_images

EXAMPLE_SEED = 7
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

    def __init__(self, studio: Studio, example: Run):
        """Adds the tab. It shows the reference of `example` at first."""
        self.studio, self.controls = studio, RunControls(studio, "generate")
        drawn = example.images["reference"]
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.prompt = gr.Textbox(
                    example.captions["reference"],
                    label="Prompt",
                    lines=1,
                    max_lines=6,
                    max_length=studio.limits.letters,
                    placeholder="What should the image show?",
                    elem_id="generate-prompt",
                    info="Enter draws it.",
                )
                [self.go] = self.controls.add_buttons("Draw")
                samples = EXAMPLES.get(studio.defaults.model, EXAMPLES[""])
                self.examples = Examples.of(samples, [prompt for prompt, _ in samples])
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status(f"An example, made by {example.settings.model} before.")
                self.shown = ShownRun(
                    "generate",
                    lambda run, name: image_alone(run.images[name], run.captions[name]),
                    first=image_alone(drawn, example.captions["reference"]),
                    columns=2,
                    run=example,
                    image=drawn,
                    further="" if studio.spec.condition == "control" else "Edit this",
                )
                self.under = self.shown.under
            with gr.Column(elem_classes="options"):
                steering = self._steering()
                self.fields = {"prompt": self.prompt, **steering, **self._settings(), **self._start_image()}

    def _settings(self) -> FormFields:
        with gr.Accordion("Settings", open=False, elem_id="generate-settings"):
            fields = size_and_seed_fields(self.studio, seed=EXAMPLE_SEED)
            fields["count"] = gr.Slider(
                1,
                self.studio.limits.images,
                1,
                step=1,
                label="Images",
                info="Each with a seed one higher.",
            )
            self.new_seed = gr.Checkbox(False, label="A new seed each time")
            return fields | guidance_fields(self.studio)

    def _start_image(self) -> FormFields:
        with gr.Accordion("Start from an image", open=False, elem_id="generate-start"):
            self.upload, image, _ = image_input(self.studio, label="Image", elem_id="generate-image")
            strength = gr.Slider(
                0.05, 1, 0.8, step=0.05, label="Strength", info="1 keeps nothing of the image."
            )
        return {"image": image, "strength": strength}

    def _steering(self) -> FormFields:
        """Adds what steers the model, if it was trained with a control image or Redux images."""
        self.sources: dict[str, ImageSource] = {}
        kind = self.studio.spec.condition
        if kind not in ("control", "redux"):
            return {}
        traits = {"canny": "Image whose edges it has", "depth": "Image whose depth it has"}
        label = traits.get(self.studio.spec.control or "", "Image to vary")
        self.sources[kind] = source = ImageSource(self.studio, label, f"generate-{kind}")
        if kind == "control":
            return {"control": source.held}
        strength = gr.Slider(
            0,
            MOST_STRENGTH,
            1,
            step=0.05,
            label="Strength of the image",
            info="Below 1, the prompt counts for more.",
        )
        return {"redux": source.held, "redux_strength": strength}

    def _wire_size(self) -> None:
        """Gives images the shape of the control image."""
        size = [self.fields["width"], self.fields["height"]]

        def size_to(file: str | None) -> Changes:
            if file is None:
                return dict.fromkeys(size, gr.skip())
            sides = natural_size(held_image(file), self.studio.spec.size)
            return dict(zip(size, (max(SMALLEST, side) for side in sides), strict=True))

        self.sources["control"].held.change(size_to, self.fields["control"], size, **UNQUEUED)

    def wire(self, history: History) -> None:
        """Connects the events; `history` shows each new image."""
        self.controls.wire_stop()
        if "control" in self.sources:
            self._wire_size()

        def settings_of(form: Form) -> ResolvedGenerate:
            return generate_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedGenerate, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            image = held_image(form["image"]) if form["image"] else None
            given = {kind: held_image(form[kind]) for kind in self.sources if form[kind]}
            steering = steering_images(settings, given)
            for update, run in run_generate(self.studio, session, settings, image, steering):
                shown = self.shown.follow(update, run)
                yield update, shown | history.changes(session) if update.result else shown

        seed = self.fields["seed"]
        run = RunButton(self.studio, self.controls, self.fields, settings_of, work)
        outputs = [*self.shown.components, history.gallery]
        run.wire([self.go.click, self.prompt.submit], outputs, new_seed=(self.new_seed, seed))
        self.examples.wire([self.prompt, seed, self.new_seed], False)
        wire_notes(self.fields, partial(notes_about, self.studio, generate_settings))

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        shown = [*self.shown.components, self.controls.status]
        uploads = [self.upload, *(source.upload for source in self.sources.values())]
        return [self.new_seed, *uploads, *self.fields.values(), *shown]

    def restored(self, settings: GenerateSettings, said: Mapping[str, Any], files: Files) -> Changes:
        """Fills the form as for one image of these settings, or for all if `said` names none."""
        first, upload = settings.prompts[0], files.upload and str(files.upload)
        image = upload if settings.image else None
        values = {name: getattr(settings, name) for name in (*SAMPLING, "strength")}
        values["prompt"] = said.get("prompt", first.prompt)
        values["seed"] = said.get("seed", first.seed)
        values["count"] = 1 if "prompt" in said else len(settings.prompts)
        values["image"] = image
        filled = {self.fields[name]: value for name, value in values.items()}
        for kind, source in self.sources.items():
            filled |= dict.fromkeys((source.upload, source.held), upload if getattr(settings, kind) else None)
        return {self.new_seed: False, self.upload: image, **filled}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Shows an image of this session once more."""
        return {**self.shown.show(run, name), self.controls.status: status_html("From your images.")}
