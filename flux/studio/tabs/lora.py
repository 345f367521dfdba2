"""The tab that looks into a LoRA, and draws with and without it."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder

from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.form_values import MOST_STRENGTH, Form
from flux.studio.forms import lora_settings, notes_about
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.sliders import add_slider_presets, facts_html, layer_sliders, sliders_value
from flux.studio.state import Studio
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
from flux.studio.tabs.train import TrainPart
from flux.studio.viewer import image_alone, pair, viewer
from flux.studio.widgets import UNLISTED, UNQUEUED, Changes, preview, status_html
from flux.studio.words import about
from flux.studio.work.edit import known_layers
from flux.studio.work.generate import steering_images
from flux.studio.work.lora import NAME, HeldLora, keep_lora, run_lora
from flux.studio.work.train import can_train

PROMPT = "a dog on the grass"
NO_LORA = "Drop a LoRA for this model."


class LoraTab:
    """The tab that looks into a LoRA, and draws with and without it.

    Attributes:
        fields: The components that a run's settings are read from, by name.
    """

    def __init__(self, studio: Studio, first: Path | None = None):
        """Add the tab. `first` is the image that steers a run at first, for models that need one."""
        self.studio, self.controls = studio, RunControls(studio, "lora")
        self.train = TrainPart(studio, self.controls) if can_train(studio) else None
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.upload = gr.File(
                    label="LoRA (.safetensors)",
                    file_count="single",
                    file_types=[".safetensors"],
                    type="filepath",
                    height=84,
                    elem_id="lora-file",
                )
                held = gr.State(None)
                self.steering = SteeringImage(studio, "lora", first)
                self.prompt = prompt_field(studio, "lora", PROMPT, "Drawn without the LoRA and with it.")
                [self.go] = self.controls.add_buttons("Compare")
            with gr.Column(elem_classes="outputs"):
                self.controls.add_status(NO_LORA)
                self.preview = preview("lora-preview")
                self.viewer = viewer("lora-stage", None, "The comparison appears here.")
                self.under = ShownImage()
                if self.train:
                    self.train.add_samples()
            with gr.Column(elem_classes="options"):
                self.fields = {"lora": held, "prompt": self.prompt, **self.steering.fields, **self._options()}

    def _options(self) -> FormFields:
        weight = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="Strength", info="0 is without the LoRA.")
        line = "Layers in which the LoRA is added, and a factor of its strength for each."
        gr.Markdown(about(line, "layers"), elem_classes="label")
        self.sliders = layer_sliders("lora-layers")
        add_slider_presets(self.sliders, **UNQUEUED)
        with gr.Accordion("About this LoRA", open=False, elem_id="lora-about"):
            self.facts = gr.HTML("", elem_id="lora-facts")
        if self.train:
            self.train.add_form()
        with gr.Accordion("Settings", open=False, elem_id="lora-settings"):
            fields = size_and_seed_fields(self.studio, seed=7)
            return {"weight": weight, "layers": self.sliders, **fields, **guidance_fields(self.studio)}

    def connect(self, history: History) -> None:
        """Connect the events; `history` shows each new image."""
        self.steering.connect(self.fields)
        self._connect_upload()

        def settings_of(form: Form) -> ResolvedGenerate:
            self.steering.check(form)
            return lora_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedGenerate, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            steering = steering_images(settings, self.steering.images(form))
            for update, before, run in run_lora(self.studio, session, settings, steering):
                shown: Changes = {}
                if update.preview:
                    shown[self.preview] = gr.update(visible=True, value=update.preview)
                if update.result:
                    shown = self._shown(run, before)
                yield update, shown

        run = RunButton(self.controls, self.fields, settings_of, work, history)
        run.connect([self.go.click, self.prompt.submit], self._shown_parts)
        connect_notes(self.fields, partial(notes_about, self.studio, lora_settings))

    def _connect_upload(self) -> None:
        """Let an uploaded LoRA show its layers, and a wrong one leave what is shown."""
        held = self.fields["lora"]
        shown = [held, self.sliders, self.facts]

        def show(session: Session, lora: HeldLora) -> Changes:
            value = sliders_value(lora.report, *known_layers(self.studio, session), most=MOST_STRENGTH)
            return {held: str(lora.path), self.sliders: value, self.facts: facts_html(lora.report)}

        def keep(request: gr.Request, uploaded: Any) -> Changes:
            session = self.studio.sessions.of(request.session_hash)
            lora = keep_lora(self.studio, session, uploaded, Path(get_upload_folder()))
            opened = lora.report.lora
            changed = f"{lora.path.name} changes {len(opened.layers)} of {opened.num_layers} layers."
            return {**show(session, lora), self.controls.status: status_html(changed)}

        def show_trained(session: Session, lora: HeldLora) -> Changes:
            return {**show(session, lora), self.upload: str(lora.path)}

        changed = [*shown, self.controls.status]

        def forget() -> Changes:
            return dict(zip(changed, (None, None, "", status_html(NO_LORA)), strict=True))

        # Not passed through gradio's preprocessing, which would read arbitrary uploads.
        kept = self.upload.upload(
            keep, self.upload, changed, preprocess=False, concurrency_limit=None, **UNLISTED
        )
        kept.failure(lambda: None, None, self.upload, queue=False, **UNLISTED)
        self.upload.clear(forget, None, changed, queue=False, **UNLISTED)
        if self.train:
            self.train.connect(show_trained, [*shown, self.upload])

    @property
    def _shown_parts(self) -> list[Component]:
        return [self.preview, self.viewer, *self.under.components]

    def _shown(self, run: Run, before: Run | None) -> Changes:
        """Show a run's image, over the one without the LoRA if there is one."""
        path, shows = run.images[NAME], run.captions[NAME]
        if before is None:
            value = image_alone(path, shows)
        else:
            with_it = f"{shows}, with {Path(run.settings.lora[-1].file).stem}"
            value = pair(before.images[NAME], shows, path, with_it, tags=("Without", "With"))
        return {
            self.preview: gr.update(visible=False),
            self.viewer: value,
            **self.under.show(run, path),
        }

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = [self.fields[name] for name in self.fields if name not in ("lora", "layers")]
        form = dict.fromkeys([*self.steering.restorable, *form])
        return [*form, *self._shown_parts, self.controls.status]

    def restored(self, settings: GenerateSettings, details: Mapping[str, Any], files: Files) -> Changes:  # noqa: ARG002 - a run has one image
        """Fill the form with these settings, all but the LoRA and its layers."""
        first, lora = settings.prompts[0], settings.lora[-1]
        values = sampling_values(self.studio, settings)
        values |= {"prompt": first.prompt, "seed": first.seed}
        values["weight"] = min(max(lora.weight, 0.0), MOST_STRENGTH)
        status = status_html(f"Made with {Path(lora.file).name}: drop it, if it is not the one that is here.")
        return {**filled(self.fields, values), **self.steering.restored(files), self.controls.status: status}

    def shown_again(self, run: Run, name: str) -> Changes:  # noqa: ARG002 - a run has one image
        """Show an image of this session once more."""
        return self._shown(run, None)
