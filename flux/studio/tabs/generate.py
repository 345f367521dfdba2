"""The tab that generates images."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.form_values import Form
from flux.studio.forms import generate_settings, notes_about
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import (
    Examples,
    FormFields,
    connect_notes,
    filled,
    guidance_fields,
    kind_of_examples,
    prompt_field,
    sampling_values,
    size_and_seed_fields,
)
from flux.studio.tabs.history import Files, History
from flux.studio.tabs.runs import RunButton
from flux.studio.tabs.shown import ShownRun
from flux.studio.tabs.steering_image import SteeringImage
from flux.studio.viewer import image_alone, pair
from flux.studio.widgets import Changes, held_image, image_input
from flux.studio.work.generate import run_generate, steering_images

EXAMPLE_SEED = 7
EXAMPLES = {
    "small": [
        ("a dog wearing a top hat on the grass", 7),
        ("an owl in the forest", 4),
        ("a red car on the street", 3),
        ("a penguin in front of mountains", 5),
    ],
    "steered": [("a cat on the grass", 7), ("a dog in the snow", 7), ("a dog at night", 7)],
    "large": [
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
        """Add the tab. It shows the reference of `example` at first."""
        self.studio, self.controls = studio, RunControls(studio, "generate")
        drawn = example.images["reference"]
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.steering = SteeringImage(studio, "generate", drawn if studio.spec.folder else None)
                self.prompt = prompt_field(
                    studio, "generate", example.captions["reference"], "Enter draws it."
                )
                [self.go] = self.controls.add_buttons("Draw")
                samples = EXAMPLES[kind_of_examples(studio)]
                self.examples = Examples.of(samples, [prompt for prompt, _ in samples])
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status(f"An example, made by {example.settings.model} before.")
                self.shown = ShownRun(
                    "generate",
                    _viewed,
                    first=image_alone(drawn, example.captions["reference"]),
                    columns=2,
                    run=example,
                    image=drawn,
                )
                self.under = self.shown.under
            with gr.Column(elem_classes="options"):
                self.fields = {"prompt": self.prompt, **self.steering.fields, **self._settings()}
                self.fields |= self._start_image()

    def _settings(self) -> FormFields:
        with gr.Accordion("Settings", open=False, elem_id="generate-settings"):
            fields = size_and_seed_fields(self.studio, seed=EXAMPLE_SEED, has_count=True)
            self.new_seed = gr.Checkbox(False, label="A new seed each time")
            return fields | guidance_fields(self.studio)

    def _start_image(self) -> FormFields:
        with gr.Accordion("Start from an image", open=False, elem_id="generate-start"):
            self.upload, image, _ = image_input(self.studio, label="Image", elem_id="generate-image")
            strength = gr.Slider(
                0.05, 1, 0.8, step=0.05, label="Strength", info="1 keeps nothing of the image."
            )
        return {"image": image, "strength": strength}

    def connect(self, history: History) -> None:
        """Connect the events; `history` shows each new image."""
        self.steering.connect(self.fields)

        def settings_of(form: Form) -> ResolvedGenerate:
            return generate_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedGenerate, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            image = held_image(form["image"]) if form["image"] else None
            steering = steering_images(settings, self.steering.images(form))
            for update, run in run_generate(self.studio, session, settings, image, steering):
                yield update, self.shown.follow(update, run)

        seed = self.fields["seed"]
        run = RunButton(self.controls, self.fields, settings_of, work, history)
        triggers = [self.go.click, self.prompt.submit]
        run.connect(triggers, self.shown.components, new_seed=(self.new_seed, seed))
        self.examples.connect([self.prompt, seed, self.new_seed], False)
        connect_notes(self.fields, partial(notes_about, self.studio, generate_settings))

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = [self.new_seed, self.upload, *self.steering.restorable, *self.fields.values()]
        return list(dict.fromkeys([*form, *self.shown.components]))

    def restored(self, settings: GenerateSettings, details: Mapping[str, Any], files: Files) -> Changes:
        """Fill the form as for one image of these settings, or for all if `details` name none."""
        first, image = settings.prompts[0], files.one_of("image")
        values = sampling_values(self.studio, settings)
        values["strength"] = settings.strength
        values["prompt"] = details.get("prompt", first.prompt)
        values["seed"] = details.get("seed", first.seed)
        values["count"] = 1 if "prompt" in details else len(settings.prompts)
        values["image"] = image
        form = filled(self.fields, values)
        return {self.new_seed: False, self.upload: image, **form, **self.steering.restored(files)}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Show an image of this session once more."""
        return self.shown.show(run, name)


def _viewed(run: Run, name: str) -> dict[str, Any]:
    """Make the viewer's value: an image of a run, over its control image if it has one."""
    control, shown = run.folder / "control.png", (run.images[name], run.captions[name])
    return pair(control, "the control image", *shown) if control.is_file() else image_alone(*shown)
