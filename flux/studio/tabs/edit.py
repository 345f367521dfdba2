"""The tab that edits: a reference, the injection in its layers, a mask, and before and after."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.editing.photo import natural_size
from flux.errors import InputError
from flux.images.io import thumbnail
from flux.settings.doses import DEFAULT_DOSE, DOSES
from flux.settings.edits import EditSettings
from flux.settings.resolved import ResolvedEdit
from flux.studio.engine import MadeImage, Update
from flux.studio.forms import SAMPLING, Form, dose_values, edit_settings, format_edits
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.common import (
    UNQUEUED,
    Examples,
    FormFields,
    RunButton,
    RunControls,
    add_presets,
    guidance_fields,
    size_and_seed_fields,
)
from flux.studio.tabs.history import History
from flux.studio.tabs.mask import MaskCanvas
from flux.studio.widgets import (
    Changes,
    download_button,
    downloadable,
    held_image,
    image_input,
    layer_strip,
    painted_mask,
    results,
    stage,
    status_html,
    strip_value,
)
from flux.studio.work.edit import known_layers, run_edit, run_reference
from flux.vital_layers import PRESETS

PROMPT, PHOTO = "A prompt", "A photograph"
INVERSION_CHOICES = ["midpoint", "euler", "fireflow", "fixed-point", "none"]
EXAMPLES = {
    "flux-nano": [
        ("a dog on the grass", 7, "a cat on the grass\na dog wearing a top hat on the grass"),
        ("an owl in the forest", 4, "a parrot in the forest\nan owl in the snow"),
        ("a red car on the street", 3, "a blue car on the street\n> a blue car on the street at night"),
    ],
    "": [
        (
            "a photo of a dog in standing on the street",
            42,
            "a photo of a cat standing on the street\na photo of a dog sitting on the street",
        ),
    ],
}

ShownEdit = tuple[str, str, str]
"""Name, file and caption of an image of the last run."""


class EditTab:
    """The tab that edits.

    Attributes:
        fields: The components that a run's settings are read from, by name.
        layers: The strip of layers to inject in.
    """

    def __init__(self, studio: Studio):
        self.studio, self.controls = studio, RunControls(studio, "edit")
        self.vital, self.vitality = known_layers(studio)
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.fields = self._inputs()
            with gr.Column(elem_classes="outputs"):
                self._outputs()
            with gr.Column(elem_classes="options"):
                self.layers = self._layer_choice()
                self.fields |= {"layers": self.layers, **self._dose()}
                self.canvas = MaskCanvas()
                self.fields |= {"mask": self.canvas.editor, **self._settings()}
        self.results = gr.State([])  # a list of Result
        self.chosen = gr.State("")  # the name of the result that is shown

    # ---- components

    def _inputs(self) -> FormFields:
        letters = self.studio.limits.letters
        self.source = gr.Radio([PROMPT, PHOTO], value=PROMPT, label="The reference comes from")
        self.upload, self.photo = image_input(
            self.studio, label="Photograph", visible=False, elem_id="edit-photo"
        )
        prompt = gr.Textbox(
            label="What the reference shows", lines=2, max_length=letters, elem_id="edit-prompt"
        )
        edits = gr.Textbox(
            label="Edits",
            lines=3,
            max_length=letters,
            elem_id="edit-edits",
            info="One per line. A line that begins with > continues the edit above.",
        )
        self.go, self.go_reference = self.controls.add_buttons("Edit", "Reference")
        samples = EXAMPLES.get(self.studio.defaults.model, EXAMPLES[""])
        self.examples = Examples.of(
            samples, [f"{prompt} → {edits.splitlines()[0]}" for prompt, _, edits in samples]
        )
        return {"source": self.source, "photo": self.photo, "prompt": prompt, "edits": edits}

    def _outputs(self) -> None:
        self.controls.add_status()
        self.preview = stage("Preview", "Reference and edits appear here.", "edit-preview")
        self.slider = gr.ImageSlider(
            label="Reference and edit",
            show_label=False,
            interactive=False,
            visible=False,
            format="png",
            elem_classes="stage",
            elem_id="edit-slider",
            max_height=600,
            buttons=["fullscreen"],
        )
        self.gallery = results("Edits", "edit-gallery")
        with gr.Row(elem_classes="save"):
            self.go_on = gr.Button("Continue from this edit", size="sm", interactive=False)
            self.png, self.record = download_button("Image"), download_button("run.json")

    def _layer_choice(self) -> gr.HTML:
        spec = self.studio.spec
        gr.Markdown("Layers in which the reference's keys and values are injected", elem_classes="label")
        strip = layer_strip(strip_value(self.studio, self.vital, self.vitality), elem_id="edit-layers")
        published = PRESETS["stable-flow"]
        presets = {
            "Vital": self.own_vital,
            **({"Paper's": published} if spec.num_layers > max(published) else {}),
            "Double": range(spec.params.depth),
            "All": range(spec.num_layers),
            "None": (),
        }
        add_presets(presets, strip, self.strip)
        return strip

    def _dose(self) -> FormFields:
        default = dose_values(DEFAULT_DOSE)
        with gr.Row():
            dose = gr.Dropdown(list(DOSES), value=DEFAULT_DOSE, label="Dose", min_width=120)
            parts = gr.Radio(
                [("K and V", "kv"), ("K", "k"), ("V", "v")], value="kv", label="Injected", min_width=180
            )
        weight = gr.Slider(0, 1, default["weight"], step=0.05, label="Strength")
        with gr.Row():
            start = gr.Slider(0, 1, default["inject_from"], step=0.05, label="From", min_width=120)
            end = gr.Slider(0, 1, default["inject_until"], step=0.05, label="Until", min_width=120)
        falling = gr.Checkbox(bool(default["falling"]), label="Strength falls to zero on the way")
        numbers: FormFields = {
            "weight": weight,
            "inject_from": start,
            "inject_until": end,
            "falling": falling,
        }
        dose.input(lambda name: list(dose_values(name).values()), dose, list(numbers.values()), **UNQUEUED)
        return {"dose": dose, "parts": parts, **numbers}

    def _settings(self) -> FormFields:
        with gr.Accordion("Settings", open=False, elem_id="edit-settings"):
            return {
                **size_and_seed_fields(self.studio, seed=7),
                **guidance_fields(self.studio),
                "inversion": gr.Dropdown(
                    INVERSION_CHOICES,
                    value=INVERSION_CHOICES[0],
                    label="Inversion of a photograph",
                    visible=False,
                ),
                "paste_back": gr.Checkbox(
                    False, label="Give the photograph back in its full size", visible=False
                ),
            }

    def own_vital(self, request: gr.Request) -> dict[str, Any]:
        """Makes the value of the strip of layers with the vital ones, by the visitor's own scan first."""
        return self.strip(*known_layers(self.studio, self.studio.sessions.of(request.session_hash)))

    def strip(self, layers: Iterable[int], vitality: dict[int, float] | None = None) -> dict[str, Any]:
        """Makes the value of the strip of layers, with this vitality or the one known at the start."""
        return strip_value(self.studio, layers, vitality or self.vitality)

    # ---- events

    def wire(self, history: History) -> None:
        """Connects the events; `history` shows each new image."""

        def settings_of(form: Form) -> ResolvedEdit:
            photo_in(form)
            return edit_settings(self.studio, form)

        def work(
            session: Session, settings: ResolvedEdit, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            mask = painted_mask(form["mask"])
            for update, run in run_edit(self.studio, session, settings, photo_in(form), mask):
                if (made := update.result) is None:
                    yield update, self._previewed(update)
                    continue
                shown: Changes = {self.preview: made.image}
                if made.name != "reference":
                    shown = self._shown(run, made.name)
                elif session.reference_id != self.studio.engine.kept_id:
                    # Not if it is there already: this would erase the mask that was painted on it.
                    session.reference_id = self.studio.engine.kept_id
                    shown |= self.canvas.show(made.image)
                yield update, shown | history.changes(session)

        def reference_settings_of(form: Form) -> ResolvedEdit:
            return settings_of({**form, "edits": form["edits"] or "-"})  # the edits do not matter here

        def reference_work(
            session: Session, settings: ResolvedEdit, form: Form
        ) -> Iterator[tuple[Update[Image.Image], Changes]]:
            for update in run_reference(self.studio, session, settings, photo_in(form)):
                image, shown = update.result or update.preview, Changes()
                if image:
                    shown[self.preview] = gr.update(visible=True, value=image)
                if update.result:
                    session.reference_id = self.studio.engine.kept_id
                    shown |= {part: gr.update(visible=False) for part in (self.slider, self.gallery)}
                    shown |= self.canvas.show(update.result)
                yield update, shown

        outputs = [*self._result_parts, *self.canvas.components, history.gallery]
        edit = RunButton(self.studio, self.controls, self.fields, settings_of, work)
        edit.wire([self.go.click], outputs)
        reference = RunButton(self.studio, self.controls, self.fields, reference_settings_of, reference_work)
        reference.wire([self.go_reference.click], outputs)
        self.controls.wire_stop()
        self.canvas.wire()
        self._wire_source()
        self._wire_results()

    def _wire_source(self) -> None:
        """Shows the fields of a photograph, sizes the run to it, and lets examples fill the form."""
        fields = self.fields
        prompt = fields["prompt"]

        def choose(chosen: str) -> tuple[Any, ...]:
            for_photo = gr.update(visible=chosen == PHOTO)
            label = "What the photograph shows" if chosen == PHOTO else "What the reference shows"
            return for_photo, for_photo, for_photo, gr.update(label=label)

        def size_to(path: str | None) -> Changes:
            if path is None:
                return {fields["width"]: gr.skip()}
            image = held_image(path)
            width, height = natural_size(image, self.studio.spec.size)
            sizes = {fields["width"]: width, fields["height"]: height}
            return {**sizes, **self.canvas.show(thumbnail(image, 1024))}

        self.source.change(
            choose, self.source, [self.upload, fields["inversion"], fields["paste_back"], prompt], **UNQUEUED
        )
        self.photo.change(
            size_to, self.photo, [fields["width"], fields["height"], *self.canvas.components], **UNQUEUED
        )
        self.examples.wire([prompt, fields["seed"], fields["edits"], self.source], PROMPT)

    def _wire_results(self) -> None:
        """Lets a click show a result beside its reference, and a further turn start from it."""
        edits = self.fields["edits"]

        def choose(results: list[ShownEdit], event: gr.SelectData) -> tuple[Any, ...]:
            name, path, _ = results[event.index]
            pair = gr.update(value=(results[0][1], path))
            return name, pair, downloadable(path), gr.update(interactive=name != "reference")

        def go_on(results: list[ShownEdit], chosen: str, text: str) -> str:
            caption = next((caption for name, _, caption in results if name == chosen), "")
            lines = (text or "").splitlines()
            prompts = [line.lstrip("> ").strip() for line in lines]
            place = prompts.index(caption) + 1 if caption in prompts else len(lines)
            return "\n".join([*lines[:place], f"> {caption}", *lines[place:]])

        self.gallery.select(
            choose, self.results, [self.chosen, self.slider, self.png, self.go_on], **UNQUEUED
        )
        self.go_on.click(go_on, [self.results, self.chosen, edits], edits, **UNQUEUED)

    # ---- what is shown

    @property
    def _result_parts(self) -> list[Component]:
        saves = [self.png, self.record, self.go_on]
        return [self.preview, self.slider, self.gallery, *saves, self.results, self.chosen]

    def _previewed(self, update: Update) -> Changes:
        if not update.preview:
            return {}
        return {
            self.slider: gr.update(visible=False),
            self.preview: gr.update(visible=True, value=update.preview),
        }

    def _shown(self, run: Run, name: str) -> Changes:
        made = [(each, str(path), run.captions[each]) for each, path in run.images.items()]
        path = str(run.images[name])
        return {
            self.preview: gr.update(visible=False),
            self.slider: gr.update(visible=True, value=(str(run.images["reference"]), path)),
            self.gallery: gr.update(visible=True, value=[(file, caption) for _, file, caption in made]),
            self.png: downloadable(path),
            self.record: downloadable(run.record),
            self.go_on: gr.update(interactive=name != "reference"),
            self.results: made,
            self.chosen: name,
        }

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = [self.upload, *self.fields.values(), *self.canvas.components]
        return list(dict.fromkeys([*form, *self._result_parts, self.controls.status]))

    def restored(self, settings: EditSettings, about: Mapping[str, Any], upload: Path | None) -> Changes:
        """Fills the form with these settings."""
        names = (*SAMPLING, "seed", "dose", "parts", "inversion", "paste_back")
        values: dict[str, Any] = {name: getattr(settings, name) for name in names}
        for name, default in dose_values(settings.dose).items():
            given = getattr(settings, name)
            values[name] = default if given is None else given
        layers = about.get("layers") or settings.vital_layers
        if isinstance(layers, str):
            layers = self.vital
        existing = range(self.studio.spec.num_layers)
        values["layers"] = self.strip(layer for layer in layers if layer in existing)
        values["source"] = PHOTO if settings.photo else PROMPT
        values["photo"] = upload and str(upload)
        values["prompt"] = settings.prompt or ""
        values["edits"] = format_edits(settings.edits)
        filled = {self.fields[name]: value for name, value in values.items()}
        # A mask is not brought back: it may belong to another image by now.
        return {self.upload: values["photo"], **filled, **self.canvas.clear()}

    def shown_again(self, run: Run, name: str) -> Changes:
        """Shows an image of this session beside its reference."""
        return {**self._shown(run, name), self.controls.status: status_html("From this session.")}


def photo_in(form: Form) -> Image.Image | None:
    """Reads the photograph that a form names, or returns None if the reference comes from a prompt.

    Raises:
        InputError: The photograph was not uploaded, or has been deleted since.
    """
    if form["source"] == PROMPT:
        return None
    if form["photo"] is None:
        raise InputError("Got no photograph: upload one, or let the reference come from a prompt")
    return held_image(form["photo"])
