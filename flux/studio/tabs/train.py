"""The part of the LoRA tab that trains one on a handful of images."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder

from flux.settings.train import TrainSettings
from flux.studio.form_values import Form
from flux.studio.forms import MOST_TRAINING_STEPS, notes_about, train_settings
from flux.studio.hardening import TRAINING_IMAGES
from flux.studio.progress import Update
from flux.studio.sessions import Session
from flux.studio.state import Studio
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import FormFields, connect_notes
from flux.studio.tabs.runs import RunButton
from flux.studio.widgets import UNLISTED, UNQUEUED, Changes, results
from flux.studio.words import about
from flux.studio.work.lora import HeldLora
from flux.studio.work.train import Sample, keep_images, run_training


class TrainPart:
    """Images, a few settings, a button, and the samples of the training.

    Attributes:
        fields: The components that a training's settings are read from, by name.
        samples: The gallery of samples.
    """

    fields: FormFields
    samples: gr.Gallery

    def __init__(self, studio: Studio, controls: RunControls):
        self._studio, self._controls = studio, controls

    def add_form(self) -> None:
        """Add the form, folded."""
        with gr.Accordion("Train a LoRA", open=False, elem_id="lora-train"):
            self._upload = gr.File(
                label=f"1 to {TRAINING_IMAGES} images",
                file_count="multiple",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                type="filepath",
                elem_id="lora-images",
            )
            trigger = gr.Textbox(
                "flower bell",
                label="Trigger",
                max_length=100,
                elem_id="lora-trigger",
                info="The words that will call what the images show.",
            )
            layers = gr.Radio(
                [("the vital ones", "vital"), ("all", "all")],
                value="vital",
                label="Layers to train",
                info=about("Fewer make a smaller file.", "vitality"),
            )
            steps = gr.Slider(
                1,
                MOST_TRAINING_STEPS,
                200,
                step=1,
                label="Training steps",
                info="The status line says the time left.",
            )
            seed = gr.Number(0, label="Seed", precision=0)
            self._go = gr.Button("Train", elem_id="lora-learn")
            self._controls.start.append(self._go)
        images = gr.State(None)
        self.fields = {"images": images, "trigger": trigger, "layers": layers, "steps": steps, "seed": seed}

    def add_samples(self) -> None:
        """Add the gallery of samples, hidden as long as there are none."""
        self.samples = results("Samples of the training", "lora-samples", columns=2, zoomable=True)

    def connect(self, show: Callable[[Session, HeldLora], Changes], outputs: list[Component]) -> None:
        """Connect the events.

        Args:
            show: Shows the trained LoRA.
            outputs: The components that it changes.
        """
        images = self.fields["images"]

        def keep(request: gr.Request, uploaded: Any) -> str | None:
            if not uploaded:
                return None
            session = self._studio.sessions.of(request.session_hash)
            kept = keep_images(self._studio, session, uploaded, Path(get_upload_folder()))
            return str(kept[0].parent)

        def settings_of(form: Form) -> TrainSettings:
            return train_settings(self._studio, form)

        def work(
            session: Session, settings: TrainSettings, _: Form
        ) -> Iterator[tuple[Update[Sample | HeldLora], Changes]]:
            samples: list[tuple[str, str]] = []
            for update in run_training(self._studio, session, settings):
                shown: Changes = {}
                if isinstance(update.result, Sample):
                    samples.append((str(update.result.path), f"step {update.result.step}"))
                    shown = {self.samples: gr.update(value=list(samples), visible=True)}
                elif update.result:
                    shown = show(session, update.result)
                yield update, shown

        # `change`, since single images can be removed. Not passed through gradio's preprocessing, which would
        # open arbitrary uploads.
        kept = self._upload.change(
            keep, self._upload, images, preprocess=False, concurrency_limit=None, **UNLISTED
        )
        kept.failure(lambda: (None, None), None, [self._upload, images], queue=False, **UNLISTED)
        # The status line and the samples may be out of sight here.
        self._go.click(None, None, None, js="() => { studio.look(); }", **UNQUEUED)
        training = RunButton(self._controls, self.fields, settings_of, work)
        training.connect([self._go.click], [self.samples, *outputs])
        connect_notes(self.fields, partial(notes_about, self._studio, train_settings))
