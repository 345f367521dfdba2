"""Fields of the Edit tab: how much of the reference is injected, and how a photograph is edited."""

from typing import Any

import gradio as gr

from flux.settings.doses import DEFAULT_DOSE, DoseName, InjectedParts
from flux.settings.edits import Inversion
from flux.studio.form_values import DOSE_FIELDS, dose_values
from flux.studio.tabs.fields import FormFields
from flux.studio.widgets import UNQUEUED
from flux.studio.words import about

DOSE_LABELS: dict[DoseName, str] = {
    "auto": "Auto: any edit",
    "balanced": "Balanced: replace, wear, recolour",
    "replace": "Replace: closer to the reference",
    "add": "Add: another object",
    "scene": "Scene: another place or time",
    "paper": "Paper: as published, in all steps",
}
PARTS_LABELS: dict[InjectedParts, str] = {
    "kv": "Keys and values",
    "k": "Keys",
    "v": "Values",
    "q": "Queries",
    "qk": "Queries and keys",
    "qv": "Queries and values",
    "qkv": "Queries, keys and values",
}
METHOD_LABELS: dict[Inversion, str] = {
    "noising": "Noising: new noise in each step",
    "midpoint": "Midpoint: inverts, two passes",
    "fireflow": "FireFlow: inverts, reuses passes",
    "euler": "Euler: inverts, one pass",
    "fixed-point": "Fixed point: inverts, four passes",
    "directedit": "DirectEdit: along Euler's steps",
    "none": "FlowEdit: no inversion",
    "decflowedit": "DecFlowEdit: FlowEdit, twice",
}
"""The name on the page of each choice of `flux.settings.edits.EditSettings`."""


def dose_fields() -> FormFields:
    """Make the fields of a dose. Choosing another one fills in its numbers."""
    usual = dose_values(DEFAULT_DOSE)
    dose = gr.Dropdown(
        _choices(DOSE_LABELS),
        value=DEFAULT_DOSE,
        label="Dose",
        info=about("How much of the reference is injected.", "dose"),
    )
    strength = _fraction("Strength", usual["weight"], "1 injects the reference's kv, 0 keeps the edit's own.")
    gr.Markdown(about("The share of the steps in which kv is injected.", "window"), elem_classes="label")
    with gr.Row():
        start = _fraction("From", usual["inject_from"])
        end = _fraction("Until", usual["inject_until"])
    falling = gr.Checkbox(bool(usual["falling"]), label="Strength falls to zero on the way")
    numbers: FormFields = dict(zip(DOSE_FIELDS, (strength, start, end, falling), strict=True))
    dose.input(lambda name: list(dose_values(name).values()), dose, list(numbers.values()), **UNQUEUED)
    return {"dose": dose, **numbers}


def advanced_fields() -> FormFields:
    """Make the fields of choices that few edits need, folded. The method is hidden without a photograph."""
    with gr.Accordion("Advanced", open=False, elem_id="edit-advanced"):
        parts = gr.Dropdown(
            _choices(PARTS_LABELS),
            value="kv",
            label="What is injected",
            info=about("Queries too keep even more of the reference's layout.", "kv"),
        )
        method = gr.Dropdown(
            _choices(METHOD_LABELS),
            value="noising",
            label="Method for a photograph",
            info=about("How edits of the photograph are made.", "inversion"),
            visible=False,
        )
    return {"parts": parts, "inversion": method}


def _choices(labels: dict[Any, str]) -> list[tuple[str, str]]:
    return [(label, value) for value, label in labels.items()]


def _fraction(label: str, value: float, info: str | None = None) -> gr.Slider:
    return gr.Slider(0, 1, value, step=0.05, label=label, info=info, min_width=120)
