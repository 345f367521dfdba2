"""The tab that edits: a reference, the injection in its layers, a mask, and before and after."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image, thumbnail
from flux.images.sizes import natural_size
from flux.settings.edits import EditSettings
from flux.settings.resolved import ResolvedEdit
from flux.studio.form_values import Form, dose_values, format_edits
from flux.studio.forms import edit_settings, notes_about
from flux.studio.painter import board, painted_mask, painter
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session, read_back
from flux.studio.state import Studio
from flux.studio.strip import layer_strip, strip_value
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.dose import advanced_fields, dose_fields
from flux.studio.tabs.edits_shown import EditsShown
from flux.studio.tabs.fields import (
    Examples,
    FormFields,
    add_presets,
    connect_notes,
    filled,
    guidance_fields,
    kind_of_examples,
    sampling_values,
    size_and_seed_fields,
)
from flux.studio.tabs.history import Files, History
from flux.studio.tabs.runs import RunButton
from flux.studio.tabs.steering_image import SteeringImage
from flux.studio.visits import existing_file
from flux.studio.widgets import UNQUEUED, Changes, held_image, image_input, status_html
from flux.studio.words import about
from flux.studio.work.edit import known_layers, run_edit, run_reference
from flux.studio.work.generate import steering_images
from flux.vital_layers import PRESETS

PROMPT, PHOTO = "A prompt", "A photograph"
ABOUT_MASK = (
    "Paint where the edit may change the reference. If nothing is painted, the dose auto finds a mask by "
    'itself; with any other dose the whole image may change. <a href="#word-mask">Mask?</a>'
)
EXAMPLES = {
    "small": [
        ("a dog on the grass", 7, "a cat on the grass\na dog wearing a top hat on the grass"),
        ("an owl in the forest", 4, "a parrot in the forest\nan owl in the snow"),
        ("a red car on the street", 3, "a blue car on the street\n> a blue car on the street at night"),
    ],
    "steered": [
        ("a dog on the grass", 7, "a cat on the grass\na dog wearing a top hat on the grass"),
        ("a dog on the grass", 4, "a tiger on the grass\n> a tiger on the grass at night"),
    ],
    "large": [
        (
            "a photo of a dog in standing on the street",
            42,
            "a photo of a cat standing on the street\na photo of a dog sitting on the street",
        ),
    ],
}


class EditTab:
    """The tab that edits.

    Attributes:
        fields: The components that a run's settings are read from, by name.
        layers: The strip of layers to inject in.
    """

    def __init__(self, studio: Studio, example: Run):
        """Add the tab. It shows the edits of `example` at first."""
        self.studio, self.controls = studio, RunControls(studio, "edit")
        self.vital, self.vitality = known_layers(studio)
        self.example: Any = example.settings
        drawn = example.images["reference"]
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                first = drawn if studio.spec.folder else None
                self.steering = SteeringImage(studio, "edit", first)
                self.fields = {**self.steering.fields, **self._inputs()}
            with gr.Column(elem_classes="outputs"):
                made_by = example.settings.model
                self.controls.add_status(
                    f"An example, made by {made_by} before. Change its prompts or layers, and press Edit."
                )
                self.shown = EditsShown(example)
            with gr.Column(elem_classes="options"):
                self.layers = self._layer_choice()
                self.fields |= {"layers": self.layers, **dose_fields()}
                # Edits of an image to fill may change what its mask says.
                self.canvas = self.steering.canvas or painter("edit-mask", board(drawn), ABOUT_MASK)
                self.fields |= {"mask": self.canvas, **self._settings(), **advanced_fields()}

    # ---- components

    def _inputs(self) -> FormFields:
        letters = self.studio.limits.letters
        self.source = gr.Radio(
            [PROMPT, PHOTO],
            value=PROMPT,
            label="The reference comes from",
            info=about("The image that edits start from.", "reference"),
            visible=self.studio.spec.condition not in ("control", "fill"),
        )
        self.upload, self.photo, self.uploaded = image_input(
            self.studio, label="Photograph", visible=False, elem_id="edit-photo"
        )
        prompt = gr.Textbox(
            self.example.prompt,
            label="What the reference shows",
            lines=2,
            max_length=letters,
            elem_id="edit-prompt",
        )
        edits = gr.Textbox(
            format_edits(self.example.edits),
            label="Edits",
            lines=3,
            max_length=letters,
            elem_id="edit-edits",
            info=about("One per line. A line that begins with > continues the edit above.", "turn"),
        )
        self.go, self.go_reference = self.controls.add_buttons("Edit", "Reference")
        samples = EXAMPLES[kind_of_examples(self.studio)]
        self.examples = Examples.of(
            samples, [f"{prompt} → {edits.splitlines()[0]}" for prompt, _, edits in samples]
        )
        return {"source": self.source, "photo": self.photo, "prompt": prompt, "edits": edits}

    def _layer_choice(self) -> gr.HTML:
        spec = self.studio.spec
        line = "Layers in which the reference's keys and values are injected."
        gr.Markdown(f"{about(line, 'layers')} {about('', 'kv').strip()}", elem_classes="label")
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

    def _settings(self) -> FormFields:
        with gr.Accordion("Settings", open=False, elem_id="edit-settings"):
            return {
                **size_and_seed_fields(self.studio, seed=self.example.seed),
                **guidance_fields(self.studio),
                "paste_back": gr.Checkbox(
                    False,
                    label="Give the photograph back in its full size",
                    info="Its own pixels are pasted back wherever nothing may change.",
                    visible=False,
                ),
            }

    def own_vital(self, request: gr.Request) -> dict[str, Any]:
        """Make the value of the strip of layers with the vital ones, by the visitor's own scan first."""
        return self.strip(*known_layers(self.studio, self.studio.sessions.of(request.session_hash)))

    def strip(self, layers: Iterable[int], vitality: dict[int, float] | None = None) -> dict[str, Any]:
        """Make the value of the strip of layers, with this vitality or the one known at the start."""
        return strip_value(self.studio, layers, vitality or self.vitality)

    # ---- events

    def connect(self, history: History) -> None:
        """Connect the events; `history` shows each new image."""

        def reference_settings(form: Form) -> ResolvedEdit:
            return self._settings_of({**form, "edits": form["edits"] or "-"})  # the edits do not matter here

        outputs = [*self.shown.components, self.canvas]
        edit = RunButton(self.controls, self.fields, self._settings_of, self._edit, history)
        edit.connect([self.go.click], outputs)
        reference = RunButton(self.controls, self.fields, reference_settings, self._draw_reference)
        reference.connect([self.go_reference.click], outputs)
        self._connect_source()
        self.shown.connect(self.fields["edits"], self.canvas)
        connect_notes(self.fields, self._notes)

    def _settings_of(self, form: Form) -> ResolvedEdit:
        """Make the settings of a run. Raise InputError for values that cannot be used."""
        photo_in(form)
        self.steering.check(form)
        return edit_settings(self.studio, form)

    def _edit(
        self, session: Session, settings: ResolvedEdit, form: Form
    ) -> Iterator[tuple[Update[MadeImage], Changes]]:
        """Make the reference and its edits, and show each."""
        mask = painted_mask(form["mask"])
        steering = steering_images(settings, self.steering.images(form))
        for update, run in run_edit(self.studio, session, settings, photo_in(form), mask, steering):
            if (made := update.result) is None:
                yield update, self.shown.show_preview(update.preview)
                continue
            shown = self.shown.show(run, made.name)
            # Not if it is there already: the visitor may be painting on it.
            if made.name == "reference" and session.reference_id != self.studio.engine.kept_id:
                shown |= self._show_on_canvas(session, made.image, mask)
            yield update, shown

    def _draw_reference(
        self, session: Session, settings: ResolvedEdit, form: Form
    ) -> Iterator[tuple[Update[Image.Image], Changes]]:
        """Make the reference alone, so that a mask can be painted on it."""
        steering = steering_images(settings, self.steering.images(form))
        for update in run_reference(self.studio, session, settings, photo_in(form), steering):
            shown = self.shown.show_preview(update.result or update.preview)
            if update.result:
                shown |= self._show_on_canvas(session, update.result, painted_mask(form["mask"]))
            yield update, shown

    def _show_on_canvas(self, session: Session, reference: Image.Image, mask: Image.Image | None) -> Changes:
        """Show the kept reference on the canvas, with what is painted there."""
        session.reference_id = self.studio.engine.kept_id
        return {self.canvas: board(thumbnail(reference, 1024), mask)}

    def _connect_source(self) -> None:
        """Show the fields of a photograph, size the run to it, and let examples fill the form."""
        fields = self.fields
        prompt = fields["prompt"]

        def choose(chosen: str) -> tuple[Any, ...]:
            for_photo = gr.update(visible=chosen == PHOTO)
            label = "What the photograph shows" if chosen == PHOTO else "What the reference shows"
            return for_photo, for_photo, for_photo, gr.update(label=label)

        def size_to(path: str) -> Changes:
            image = held_image(path)
            width, height = natural_size(image, self.studio.spec.size)
            sizes = {fields["width"]: width, fields["height"]: height}
            return {**sizes, self.canvas: board(thumbnail(image, 1024))}

        self.source.change(
            choose, self.source, [self.upload, fields["inversion"], fields["paste_back"], prompt], **UNQUEUED
        )
        sized = [fields["width"], fields["height"], self.canvas]
        self.uploaded.success(size_to, self.photo, sized, **UNQUEUED)
        self.examples.connect([prompt, fields["seed"], fields["edits"], self.source], PROMPT)
        self.steering.connect(fields)

    def _notes(self, form: Form) -> dict[str, str]:
        if form["source"] == PROMPT:
            form = {**form, "photo": None}
        return notes_about(self.studio, edit_settings, form)

    # ---- an earlier run

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = [self.upload, *self.steering.restorable, *self.fields.values()]
        return list(dict.fromkeys([*form, *self.shown.components, self.controls.status]))

    def restored(self, settings: EditSettings, details: Mapping[str, Any], files: Files) -> Changes:
        """Fill the form with these settings."""
        values = sampling_values(self.studio, settings)
        same = ("seed", "dose", "parts", "inversion", "paste_back")
        values |= {name: getattr(settings, name) for name in same}
        for name, default in dose_values(settings.dose).items():
            given = getattr(settings, name)
            # The page has no strengths by layer.
            values[name] = default if given is None or isinstance(given, dict) else given
        layers = details.get("layers") or settings.vital_layers
        if isinstance(layers, str):
            layers = self.vital
        existing = range(self.studio.spec.num_layers)
        values["layers"] = self.strip(layer for layer in layers if layer in existing)
        values["source"] = PHOTO if settings.photo else PROMPT
        values["photo"] = files.one_of("photo")
        values["prompt"] = settings.prompt or ""
        values["edits"] = format_edits(settings.edits)
        shown = files.shown and thumbnail(read_image(files.shown), 1024)
        canvas = {self.canvas: board(shown, files.mask) if shown else None}
        form = {self.upload: values["photo"], **filled(self.fields, values)}
        return {**form, **self.steering.restored(files), **canvas}

    def take(self, file: str) -> Changes:
        """Make an image of another tab a reference.

        An image that began with another one, or with a visitor's LoRA, becomes a photograph. All others are
        drawn again from their prompt.

        Args:
            file: The image's file.

        Raises:
            InputError: The image has been deleted.
        """
        path = existing_file(file)
        settings, details = read_back(path)
        from_photo = getattr(settings, "image", None) is not None or self.studio.has_own_lora(settings)
        values = sampling_values(self.studio, settings)
        values |= {"prompt": details["prompt"], "seed": details["seed"], "edits": ""}
        values |= {"source": PHOTO if from_photo else PROMPT, "photo": str(path) if from_photo else None}
        return {
            **filled(self.fields, values),
            self.upload: values["photo"],
            self.canvas: board(thumbnail(read_image(path), 1024)),
            **self.steering.taken(Files.beside(path, settings)),
            **self.shown.show_alone(path, details["prompt"]),
            self.controls.status: status_html("Say what the edited image should show, and press Edit."),
        }

    def shown_again(self, run: Run, name: str) -> Changes:
        """Show an image of this session beside its reference."""
        return self.shown.show(run, name)


def photo_in(form: Form) -> Image.Image | None:
    """Read the photograph that a form names, or return None if the reference comes from a prompt.

    Raises:
        InputError: The photograph was not uploaded, or has been deleted since.
    """
    if form["source"] == PROMPT:
        return None
    if form["photo"] is None:
        raise InputError("Got no photograph: upload one, or let the reference come from a prompt")
    return held_image(form["photo"])
