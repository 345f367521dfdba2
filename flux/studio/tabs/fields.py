"""The fields that several tabs have, by the names of the settings, with their notes and examples."""

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component, FormComponent

from flux.settings.demos import ModelSettings
from flux.studio.form_values import Form
from flux.studio.forms import SAMPLING
from flux.studio.state import Studio
from flux.studio.widgets import UNQUEUED, Changes
from flux.studio.words import about

FormFields = dict[str, Component]
"""The components of a form, by the names of their values."""

SMALLEST = 64  # side of an image in pixels, on the sliders
SHAPES = {"1:1": 1, "4:3": 4 / 3, "3:4": 3 / 4, "16:9": 16 / 9, "9:16": 9 / 16}


def prompt_field(studio: Studio, tab: str, value: str, info: str | None = None) -> gr.Textbox:
    """Make the field of a prompt, in which Enter starts a run."""
    return gr.Textbox(
        value,
        label="Prompt",
        lines=1,
        max_lines=6,
        max_length=studio.limits.letters,
        placeholder="What should the image show?",
        elem_id=f"{tab}-prompt",
        info=info,
    )


def size_and_seed_fields(
    studio: Studio, seed: int, has_size: bool = True, has_count: bool = False
) -> FormFields:
    """Make fields for steps and seed, by the names of the settings; and for the size, and how many images."""
    size = size_fields(studio) if has_size else {}
    steps = gr.Slider(
        1,
        studio.limits.steps,
        studio.defaults.num_steps,
        step=1,
        label="Steps",
        info="More are finer and take longer.",
    )
    number = gr.Number(seed, label="Seed", precision=0, info="The same seed repeats the image.")
    fields = {**size, "num_steps": steps, "seed": number}
    if has_count:
        fields["count"] = gr.Slider(
            1, studio.limits.images, 1, step=1, label="Images", info="Each with a seed one higher."
        )
    return fields


def size_fields(studio: Studio) -> FormFields:
    """Make fields for the size, by the names of the settings."""
    defaults, limits = studio.defaults, studio.limits
    with gr.Row():
        width = gr.Slider(SMALLEST, limits.side, defaults.width, step=16, label="Width", min_width=200)
        height = gr.Slider(SMALLEST, limits.side, defaults.height, step=16, label="Height", min_width=200)
    # The area is limited too: where one side grows too long, the other one yields.
    # What is just being typed may be far too large; the slider itself brings it back.
    most = f"Math.floor({limits.area} / Math.min(moved, {limits.side}) / 16) * 16"
    fitting = f"(moved, other) => Math.min(other, {most})"
    width.input(None, [width, height], height, js=fitting, **UNQUEUED)
    height.input(None, [height, width], width, js=fitting, **UNQUEUED)
    with gr.Row(elem_classes="presets"):
        for label, ratio in SHAPES.items():
            shape = [round(studio.spec.size * side / 16) * 16 for side in (ratio**0.5, ratio**-0.5)]
            button = gr.Button(label, size="sm", min_width=48)
            button.click(None, None, [width, height], js=f"() => {shape}", **UNQUEUED)
    return {"width": width, "height": height}


def guidance_fields(studio: Studio) -> FormFields:
    """Make fields for both kinds of guidance; distilled guidance is hidden if the model takes none."""
    distilled = studio.spec.params.guidance_embed
    return {
        "guidance": gr.Slider(
            0,
            max(10, 2 * studio.defaults.guidance),
            studio.defaults.guidance,
            step=0.1,
            label="Guidance",
            info=about("More follows the prompt more closely.", "guidance"),
            visible=distilled,
        ),
        "true_cfg": gr.Slider(
            1,
            max(10, studio.defaults.true_cfg),
            studio.defaults.true_cfg,
            step=0.1,
            label="True CFG",
            info=about("1 is off. More takes twice the time.", "guidance"),
        ),
        "negative_prompt": gr.Textbox(
            label="Negative prompt",
            info="What the image should not show. True CFG steers away from it.",
            max_length=studio.limits.letters,
        ),
    }


def sampling_values(studio: Studio, settings: ModelSettings) -> dict[str, Any]:
    """Take how a run sampled from its settings. What they leave open is as the model has it."""
    given = {name: getattr(settings, name) for name in SAMPLING}
    return {name: getattr(studio.defaults, name) if value is None else value for name, value in given.items()}


def filled(fields: FormFields, values: Mapping[str, Any]) -> Changes:
    """Give fields these values, by their names. Values without a field are left out."""
    return {fields[name]: value for name, value in values.items() if name in fields}


def connect_notes(fields: FormFields, notes_of: Callable[[Form], Mapping[str, str]]) -> None:
    """Say beside a field what is wrong with its value, or why it has no effect, whenever one changes.

    Args:
        fields: The components of a form. Those that have a line below their label show the notes there.
        notes_of: Finds what is to be said, by the names of the fields.
    """
    usual = {name: field.info for name, field in fields.items() if isinstance(field, FormComponent)}
    read = [name for name in fields if name != "mask"]  # no note is about it, and it is large

    def note(*values: Any) -> list[dict[str, Any]]:
        notes = notes_of(dict(zip(read, values, strict=True)))
        return [
            gr.update(info=f"**{html.escape(notes[name])}**" if name in notes else line or "")
            for name, line in usual.items()
        ]

    inputs: list[Any] = [fields[name] for name in read]
    gr.on(
        [field.change for field in inputs],
        note,
        inputs,
        [fields[name] for name in usual],
        trigger_mode="always_last",
        **UNQUEUED,
    )


# ---- presets and examples


def add_presets(
    presets: Mapping[str, Iterable[int] | Callable[[gr.Request], dict[str, Any]]],
    strip: gr.HTML,
    value_of: Callable[[Iterable[int]], dict[str, Any]],
) -> None:
    """Add one button per preset, which puts the preset's layers into a strip.

    Args:
        presets: The layers of each preset, or what makes the strip's value for a visitor, by the label of its
            button.
        strip: The strip of layers.
        value_of: Makes the strip's value from layers.
    """
    with gr.Row(elem_classes="presets"):
        for label, layers in presets.items():
            button = gr.Button(label, size="sm", min_width=60)
            value = layers if callable(layers) else partial(value_of, tuple(layers))
            button.click(value, None, strip, **UNQUEUED)


def kind_of_examples(studio: Studio) -> str:
    """Name the examples that suit a model: "large", "small", or "steered" for small ones that need an image.

    The image that such a model begins with shows a dog on the grass.
    """
    if studio.spec.folder is None:
        return "large"
    return "steered" if studio.spec.condition in ("control", "fill") else "small"


@dataclass(frozen=True, eq=False)
class Examples:
    """Example values that fill a form at a click, without asking the server.

    Attributes:
        dataset: The list of examples on the page.
        samples: The values of each example.
    """

    dataset: gr.Dataset
    samples: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, samples: Sequence[Sequence[Any]], labels: Sequence[str]) -> "Examples":
        """Show examples under these labels."""
        hidden = [
            gr.Textbox(visible=False) if isinstance(value, str) else gr.Number(visible=False)
            for value in samples[0]
        ]
        dataset = gr.Dataset(
            components=hidden,
            samples=[list(sample) for sample in samples],
            sample_labels=list(labels),
            label="For example",
            elem_classes="examples",
        )
        return cls(dataset, samples)

    def connect(self, outputs: Sequence[Component], *more: Any) -> None:
        """Let a click fill the outputs with the example's values, then with `more`."""
        js = f"index => [...{json.dumps(self.samples)}[index], ...{json.dumps(more)}]"
        self.dataset.click(None, self.dataset, list(outputs), js=js, **UNQUEUED)
