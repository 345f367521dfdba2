"""The page's tab of edits: a reference, its layers, its mask, and before and after."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flux.editing.photo import natural_size
from flux.errors import InputError
from flux.settings.demos import EditSettings
from flux.settings.doses import DEFAULT_DOSE, DOSES
from flux.studio.engine import Report, Teller
from flux.studio.forms import SAMPLING, numbers_of, text_of
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio
from flux.studio.tabs.common import QUIET, connect, fill, guidance_slider, size_slider, words_place
from flux.studio.widgets import (
    held_picture,
    layer_strip,
    mask_editor,
    news,
    painted,
    picture_input,
    strip_value,
)
from flux.studio.work.edit import edit_settings_of, known_layers, make_reference, run_edit
from flux.vital_layers import PRESETS

PROMPT, PHOTO = "A prompt", "A photograph"

INVERSIONS = ["midpoint", "euler", "fireflow", "fixed-point", "none"]

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


class EditTab:
    """Attributes: form: the components that a run's settings are read from, by name."""

    def __init__(self, studio: Studio):
        self.studio = studio
        defaults, spec, limits = studio.defaults, studio.spec, studio.limits
        self.vital, self.vitality = known_layers(studio)
        dose = DOSES[DEFAULT_DOSE]
        with gr.Row(elem_classes="room"):
            with gr.Column(elem_classes="ask", min_width=280):
                self.source = gr.Radio([PROMPT, PHOTO], value=PROMPT, label="The reference comes from")
                self.place, self.photo = picture_input(
                    studio, label="Photograph", visible=False, elem_id="edit-photo"
                )
                self.prompt = gr.Textbox(
                    label="What the reference shows",
                    lines=2,
                    max_length=limits.letters,
                    elem_id="edit-prompt",
                )
                self.edits = gr.Textbox(
                    label="Edits",
                    lines=3,
                    max_length=limits.letters,
                    elem_id="edit-edits",
                    info="One a line. A line that begins with > goes on from the one above.",
                )
                self.words = words_place()
                with gr.Row(elem_classes="actions"):
                    self.go = gr.Button("Edit", variant="primary", elem_id="edit-go")
                    self.first = gr.Button("Reference", elem_id="edit-first")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="edit-stop")
                self.samples = EXAMPLES.get(defaults.model, EXAMPLES[""])
                self.examples = gr.Dataset(
                    components=[
                        gr.Textbox(visible=False),
                        gr.Number(visible=False),
                        gr.Textbox(visible=False),
                    ],
                    samples=[list(sample) for sample in self.samples],
                    sample_labels=[
                        f"{prompt} → {edits.splitlines()[0]}" for prompt, _, edits in self.samples
                    ],
                    label="For example",
                    elem_classes="examples",
                )
            with gr.Column(elem_classes="see"):
                self.news = gr.HTML(news(None, "Ready."), elem_id="edit-news")
                self.preview = gr.Image(
                    show_label=False,
                    interactive=False,
                    format="png",
                    elem_classes="stage",
                    elem_id="edit-preview",
                    label="Preview",
                    placeholder="Reference and edits appear here.",
                    buttons=["fullscreen"],
                )
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
                self.gallery = gr.Gallery(
                    label="Edits",
                    show_label=False,
                    columns=4,
                    fit_columns=False,
                    allow_preview=False,
                    interactive=False,
                    height="auto",
                    object_fit="cover",
                    elem_id="edit-gallery",
                    elem_classes="results",
                    buttons=[],
                    visible=False,
                )
                with gr.Row(elem_classes="save"):
                    self.go_on = gr.Button("Go on from this edit", size="sm", interactive=False)
                    self.png = gr.DownloadButton("Picture", size="sm", interactive=False)
                    self.record = gr.DownloadButton("run.json", size="sm", interactive=False)
            with gr.Column(elem_classes="tune", min_width=280):
                gr.Markdown(
                    "Layers where the edit takes over the reference's keys and values", elem_classes="label"
                )
                self.layers = layer_strip(
                    strip_value(spec.num_layers, spec.params.depth, self.vital, self.vitality),
                    elem_id="edit-layers",
                )
                with gr.Row(elem_classes="presets"):
                    self.presets = [
                        (gr.Button(name, size="sm", min_width=60), layers)
                        for name, layers in self.named().items()
                    ]
                with gr.Row():
                    self.dose = gr.Dropdown(list(DOSES), value=DEFAULT_DOSE, label="Dose", min_width=120)
                    self.parts = gr.Radio(
                        [("K and V", "kv"), ("K", "k"), ("V", "v")],
                        value="kv",
                        label="Taken over",
                        min_width=180,
                    )
                self.weight = gr.Slider(0, 1, dose.weight, step=0.05, label="Strength")
                with gr.Row():
                    self.start = gr.Slider(0, 1, dose.inject_from, step=0.05, label="From", min_width=120)
                    self.until = gr.Slider(0, 1, dose.inject_until, step=0.05, label="Until", min_width=120)
                self.falling = gr.Checkbox(dose.falling, label="Strength falls to zero on the way")
                with gr.Accordion("Mask", open=False, elem_id="edit-mask") as self.masking:
                    gr.Markdown(
                        "Paint where the edit may change the reference. If nothing is painted, the dose auto "
                        "finds it out, and with the others all may change.",
                        elem_classes="label",
                    )
                    self.mask = mask_editor(
                        label="Paint where the edit may change the reference",
                        elem_id="edit-canvas",
                        height=420,
                    )
                with gr.Accordion("Settings", open=False, elem_id="edit-settings"):
                    with gr.Row():
                        self.width = size_slider(studio, "Width", defaults.width)
                        self.height = size_slider(studio, "Height", defaults.height)
                    with gr.Row():
                        self.steps = gr.Slider(1, limits.steps, defaults.num_steps, step=1, label="Steps")
                        self.seed = gr.Number(7, label="Seed", precision=0, minimum=0)
                    self.guidance = guidance_slider(studio)
                    self.true_cfg = gr.Slider(
                        1, 10, defaults.true_cfg, step=0.1, label="True CFG (1: off, one pass)"
                    )
                    self.negative = gr.Textbox(label="Negative prompt", max_length=limits.letters)
                    self.inversion = gr.Dropdown(
                        INVERSIONS, value=INVERSIONS[0], label="Inversion of a photograph", visible=False
                    )
                    self.paste_back = gr.Checkbox(
                        False, label="Give the photograph back in its full size", visible=False
                    )
        self.form: dict[str, Any] = {
            "source": self.source,
            "prompt": self.prompt,
            "photo": self.photo,
            "edits": self.edits,
            "layers": self.layers,
            "dose": self.dose,
            "weight": self.weight,
            "inject_from": self.start,
            "inject_until": self.until,
            "falling": self.falling,
            "parts": self.parts,
            "mask": self.mask,
            "width": self.width,
            "height": self.height,
            "num_steps": self.steps,
            "seed": self.seed,
            "guidance": self.guidance,
            "true_cfg": self.true_cfg,
            "negative_prompt": self.negative,
            "inversion": self.inversion,
            "paste_back": self.paste_back,
        }
        self.results = gr.State([])  # of the last run: name, path and caption of each picture
        self.chosen = gr.State("")
        # What a mask is painted on, and what is there to be painted on now: a closed editor takes no picture.
        self.ground, self.painting = gr.State(None), gr.State(None)

    def named(self) -> dict[str, tuple[int, ...]]:
        """The presets of layers, by the names of their buttons."""
        spec = self.studio.spec
        paper = {"Paper's": PRESETS["stable-flow"]} if spec.num_layers > max(PRESETS["stable-flow"]) else {}
        double = tuple(range(spec.params.depth))
        return {
            "Vital": self.vital,
            **paper,
            "Double": double,
            "All": tuple(range(spec.num_layers)),
            "None": (),
        }

    def strip(self, layers: Sequence[int], vitality: dict[int, float] | None = None) -> dict:
        spec = self.studio.spec
        return strip_value(spec.num_layers, spec.params.depth, layers, vitality or self.vitality)

    def wire(self, history: Any) -> None:
        """What happens on a click; `history` is told of each new picture."""
        names, inputs = list(self.form), list(self.form.values())

        def filled(values: Sequence[Any]) -> dict[str, Any]:
            form = dict(zip(names, values))
            if form["source"] == PROMPT:
                form["photo"] = None
            elif form["photo"] is None:
                raise InputError("Got no photograph: upload one, or let the reference come from a prompt")
            else:
                form["photo"] = held_picture(form["photo"])
            form["mask"] = painted(form["mask"])
            return form

        def check(*values: Any) -> EditSettings:
            return edit_settings_of(self.studio, filled(values))

        def work(visit: Visit, *values: Any) -> Iterator[tuple[Report, dict]]:
            form = filled(values)
            settings = edit_settings_of(self.studio, form)
            kept = self.studio.engine.kept
            for report, run in run_edit(self.studio, visit, settings, form["photo"], form["mask"]):
                renewed = self.studio.engine.kept is not kept
                yield (
                    report,
                    {**self.shown(report, run, renewed), **(history.shown(visit) if report.made else {})},
                )

        def check_first(*values: Any) -> EditSettings:
            form = filled(values)
            return edit_settings_of(self.studio, {**form, "edits": form["edits"] or "-"})

        def work_first(visit: Visit, *values: Any) -> Iterator[tuple[Report, dict]]:
            form, engine = filled(values), self.studio.engine
            settings = edit_settings_of(self.studio, {**form, "edits": form["edits"] or "-"})

            def make(tell: Teller) -> None:
                tell.made("reference", make_reference(engine, settings, tell, form["photo"]).picture)

            for report in engine.run(make, visit.stop):
                picture = report.made[1] if report.made else report.preview
                shown = {self.preview: gr.update(visible=True, value=picture)} if picture else {}
                if report.made:
                    hidden = {part: gr.update(visible=False) for part in (self.slider, self.gallery)}
                    shown |= {**hidden, **self.grounded(picture)}
                yield report, shown

        outputs = [*self.shows, self.mask, self.ground, self.painting, *history.components]
        buttons = ([self.go, self.first], self.stop, self.words)
        connect(self.studio, [self.go.click], inputs, check, work, outputs, self.news, *buttons)
        connect(
            self.studio, [self.first.click], inputs, check_first, work_first, outputs, self.news, *buttons
        )
        self.wire_details()

    def wire_details(self) -> None:
        def choose_source(source: str):
            from_photo = gr.update(visible=source == PHOTO)
            label = "What the photograph shows" if source == PHOTO else "What the reference shows"
            return from_photo, from_photo, from_photo, gr.update(label=label)

        def photo_there(path: str | None):
            if path is None:
                return [gr.skip()] * 5
            photo = held_picture(path)
            width, height = natural_size(photo, self.studio.spec.size)
            small = photo.copy()
            small.thumbnail((1024, 1024))
            return width, height, canvas(small), small, None

        def choose(results: list, event: gr.SelectData):
            name, path, _ = results[event.index]
            update = gr.update(value=path, interactive=True)
            return (
                name,
                gr.update(value=(results[0][1], path)),
                update,
                gr.update(interactive=name != "reference"),
            )

        def go_on(results: list, chosen: str, text: str) -> str:
            caption = next((caption for name, _, caption in results if name == chosen), "")
            lines = (text or "").splitlines()
            place = next(
                (i for i, line in enumerate(lines) if line.lstrip("> ").strip() == caption), len(lines) - 1
            )
            return "\n".join([*lines[: place + 1], f"> {caption}", *lines[place + 1 :]])

        def dosed(name: str):
            return list(numbers_of(name).values())

        def opened(ground: Image.Image | None, painting: Image.Image | None):
            return (
                (gr.skip(), gr.skip()) if ground is None or painting is ground else (canvas(ground), ground)
            )

        quiet = {"queue": False, **QUIET}
        self.masking.expand(opened, [self.ground, self.painting], [self.mask, self.painting], **quiet)
        photo_parts = [self.place, self.inversion, self.paste_back, self.prompt]
        self.source.change(choose_source, self.source, photo_parts, **quiet)
        self.photo.change(
            photo_there, self.photo, [self.width, self.height, self.mask, self.ground, self.painting], **quiet
        )
        self.gallery.select(choose, self.results, [self.chosen, self.slider, self.png, self.go_on], **quiet)
        self.go_on.click(go_on, [self.results, self.chosen, self.edits], self.edits, **quiet)
        self.dose.input(dosed, self.dose, [self.weight, self.start, self.until, self.falling], **quiet)
        for button, layers in self.presets:
            button.click(lambda layers=layers: self.strip(layers), None, self.layers, **quiet)
        self.examples.click(
            None,
            self.examples,
            [self.prompt, self.seed, self.edits, self.source],
            js=fill(self.samples, PROMPT),
            **quiet,
        )

    def grounded(self, picture: Image.Image) -> dict:
        """Another picture to paint a mask on."""
        return {self.mask: canvas(picture), self.ground: picture, self.painting: None}

    @property
    def shows(self) -> list[Any]:
        return [
            self.preview,
            self.slider,
            self.gallery,
            self.png,
            self.record,
            self.go_on,
            self.results,
            self.chosen,
        ]

    def shown(self, report: Report, run: Run, renewed: bool) -> dict:
        """What a report changes on the page."""
        if not report.made:
            shown = {self.slider: gr.update(visible=False)}
            return (
                {**shown, self.preview: gr.update(visible=True, value=report.preview)}
                if report.preview
                else {}
            )
        name, (picture, *_) = report.made
        if name == "reference":
            return {self.preview: picture, **(self.grounded(picture) if renewed else {})}
        return self.again(run, name)

    def again(self, run: Run, name: str) -> dict:
        """A picture of this visit beside its reference."""
        results = [(each, str(path), run.captions[each]) for each, path in run.pictures.items()]
        path, reference = str(run.pictures[name]), str(run.pictures["reference"])
        return {
            self.preview: gr.update(visible=False),
            self.slider: gr.update(visible=True, value=(reference, path)),
            self.gallery: gr.update(visible=True, value=[(path, caption) for _, path, caption in results]),
            self.png: gr.update(value=path, interactive=True),
            self.record: gr.update(value=str(run.record), interactive=True),
            self.go_on: gr.update(interactive=name != "reference"),
            self.results: results,
            self.chosen: name,
        }

    @property
    def returned(self) -> list[Any]:
        """What `restored` and `again` change."""
        return [self.place, *self.form.values(), *self.shows, self.ground, self.painting, self.news]

    def restored(self, settings: EditSettings, about: dict, photo: Path | None = None) -> dict:
        """The form filled as for these settings."""
        layers = about.get("layers") or settings.vital_layers
        layers = (
            self.vital
            if isinstance(layers, str)
            else [layer for layer in layers if layer in range(self.studio.spec.num_layers)]
        )
        names = (*SAMPLING, "seed", "dose", "parts", "inversion", "paste_back")
        values = {name: getattr(settings, name) for name in names}
        own = numbers_of(settings.dose)
        values |= {name: own[name] if (given := getattr(settings, name)) is None else given for name in own}
        values |= {
            "prompt": settings.prompt or "",
            "edits": text_of(settings.edits),
            "layers": self.strip(layers),
        }
        values |= {"photo": photo and str(photo), "source": PHOTO if settings.photo else PROMPT}
        shown = {self.form[name]: value for name, value in values.items()}
        # A mask is not brought back: what it was painted on may be another picture by now.
        return {self.place: values["photo"], **shown, self.mask: None, self.ground: None, self.painting: None}


def canvas(picture: Image.Image | Path) -> dict:
    """A picture to paint on, unpainted."""
    return {"background": picture, "layers": [], "composite": None}
