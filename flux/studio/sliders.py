"""The layers of a LoRA: a row for each, with a switch, its change as a bar, and a slider."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from flux.lora.report import LoraReport, layer_rows

SLIDERS_HTML = """${value ? `<div class="sliders" role="group" aria-label="Layers of the LoRA">
  <p>${value.legend}</p>
  ${value.rows.map(row => {
      const on = value.on.includes(row.layer), factor = value.factors[row.layer];
      return `<div class="slider ${row.kind} ${on ? "" : "off"}">
    <button type="button" class="cell" data-layer="${row.layer}" aria-pressed="${on}" style="--share: 0%"
      aria-label="layer ${row.layer}${row.vital ? ", vital" : ""}" title="${row.about}">${row.layer}</button>
    <span class="star" title="vital">${row.vital ? "★" : ""}</span>
    <span class="bars" role="img" aria-label="${row.about}" title="${row.about}">
      <i style="width: ${row.share}%"></i>
      ${row.vitality === null ? "" : `<i class="vitality" style="width: ${row.vitality}%"></i>`}</span>
    <input type="range" min="0" max="${value.most}" step="0.05" value="${factor}" data-layer="${row.layer}"
      aria-label="Strength in layer ${row.layer}">
    <output>${factor.toFixed(2)}</output></div>`;
  }).join("")}
  ${value.alone ? `<p>${value.alone}</p>` : ""}
</div>` : `<p class="label">The layers that the LoRA changes appear here.</p>`}"""

SLIDERS_JS = """
const change = (layer, more, kind) => {
  props.value = {...props.value, ...more};
  trigger("input");
  requestAnimationFrame(() => element.querySelector(`${kind}[data-layer="${layer}"]`)?.focus());
};
const without = (on, layer) => on.filter(other => other !== layer);
const and = (on, layer) => [...without(on, layer), layer].sort((a, b) => a - b);
element.addEventListener("click", ({target}) => {
  const cell = target.closest(".cell");
  if (!cell) return;
  const layer = Number(cell.dataset.layer), {on} = props.value;
  change(layer, {on: (on.includes(layer) ? without : and)(on, layer)}, ".cell");
});
element.addEventListener("input", ({target}) => {
  target.parentElement.querySelector("output").textContent = Number(target.value).toFixed(2);
});
element.addEventListener("change", ({target}) => {
  const layer = Number(target.dataset.layer), {on, factors} = props.value;
  change(layer, {on: and(on, layer), factors: {...factors, [layer]: Number(target.value)}}, "input");
});
"""
PRESETS = {
    "All": "value.rows",
    "Vital": "value.rows.filter(row => row.vital)",
    "Not vital": "value.rows.filter(row => !row.vital)",
    "None": "[]",
}
"""The rows that a button switches on, in the language of the page."""


def layer_sliders(elem_id: str) -> gr.HTML:
    """Make the sliders. Their value is that of `sliders_value`, or None as long as there is no LoRA."""
    return gr.HTML(
        None, label="Layers", html_template=SLIDERS_HTML, js_on_load=SLIDERS_JS, elem_id=elem_id, visible=True
    )


def add_slider_presets(sliders: gr.HTML, **options: Any) -> None:
    """Add buttons that switch groups of layers on, and all others off, without asking the server.

    Args:
        sliders: The sliders.
        options: Options of the events.
    """
    with gr.Row(elem_classes="presets"):
        for label, rows in PRESETS.items():
            button = gr.Button(label, size="sm", min_width=60)
            js = f"value => value && ({{...value, on: {rows}.map(row => row.layer)}})"
            button.click(None, sliders, sliders, js=js, **options)


def sliders_value(
    report: LoraReport, vital: Iterable[int], vitality: Mapping[int, float] | None, most: float
) -> dict[str, Any]:
    """Make the value of `layer_sliders`: all layers that a LoRA changes, on and at factor 1.

    Args:
        report: What the LoRA changes.
        vital: The model's vital layers.
        vitality: Each layer's vitality, if the model has been scanned.
        most: The largest factor.
    """
    vital, depth = set(vital), report.lora.params.depth
    largest = max([*(vitality or {}).values(), 1e-6])
    rows = []
    for layer, row in enumerate(layer_rows([report])[: report.lora.num_layers]):
        [cell] = row.cells
        if cell.change is None:
            continue
        known = (vitality or {}).get(layer)
        about = f"layer {layer}, changed by {cell.text}"
        rows.append(
            {
                "layer": layer,
                "kind": "double" if layer < depth else "single",
                "vital": layer in vital,
                "share": round(100 * cell.share, 1),
                "vitality": None if known is None else round(100 * max(0.0, known) / largest, 1),
                "about": about if known is None else f"{about}, vitality {known:.2f}",
            }
        )
    changed = [row["layer"] for row in rows]
    untouched = ", ".join(str(layer) for layer in sorted(vital - set(changed)))
    legend = "Bars: how much the LoRA changes each layer (norm of the change)"
    legend += ", and below each the layer's vitality." if vitality else "."
    return {
        "rows": rows,
        "on": changed,
        "factors": dict.fromkeys(map(str, changed), 1.0),
        "most": most,
        "legend": f"{legend} ★: vital layers.",
        "alone": f"Vital layers that the LoRA leaves alone: {untouched}." if untouched else "",
    }


def facts_html(report: LoraReport) -> str:
    """Render what a LoRA is: its form, trainer, rank, and what its metadata say."""
    facts = {"file": report.lora.path.name, **report.facts()}
    entries = [f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()]
    return f'<dl class="facts">{"".join(entries)}</dl>'
