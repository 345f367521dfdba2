"""The strip of layers: one button for each, switched by clicks, as full as the layer is vital."""

from collections.abc import Iterable
from typing import Any

import gradio as gr

from flux.studio.state import Studio

STRIP_HTML = """<div class="strip" role="toolbar" aria-label="Layers">
${[["double", 0, value.double], ["single", value.double, value.num]].map(([kind, from, to]) => `
  <div class="cells ${kind}" role="group" aria-label="${kind}-stream layers">
    <span class="kind">${kind}-stream</span>
    ${Array.from({length: to - from}, (_, i) => from + i).map(layer => {
        const known = value.vitality && value.vitality[layer] !== undefined;
        const share = known ? value.vitality[layer] / value.top : value.vitality ? 0 : 1;
        const about = known ? `, vitality ${value.vitality[layer].toFixed(2)}` : "";
        return `<button type="button" class="cell" data-layer="${layer}"
          tabindex="${layer === (value.at || 0) ? 0 : -1}" aria-pressed="${value.on.includes(layer)}"
          aria-label="layer ${layer}, ${kind}-stream${about}" title="layer ${layer}${about}"
          style="--share: ${Math.round(100 * Math.max(0, Math.min(1, share)))}%">${layer}</button>`;
    }).join("")}
  </div>`).join("")}
</div>"""

STRIP_JS = """
const focusOn = layer => requestAnimationFrame(() => {
  const cell = element.querySelector(`.cell[data-layer="${layer}"]`);
  if (cell) cell.focus();
});
element.addEventListener("click", event => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const layer = Number(cell.dataset.layer), {on} = props.value;
  props.value = {...props.value, at: layer,
    on: on.includes(layer) ? on.filter(other => other !== layer) : [...on, layer].sort((a, b) => a - b)};
  trigger("input");
  focusOn(layer);
});
element.addEventListener("keydown", event => {
  const move = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[event.key];
  const cell = event.target.closest(".cell");
  if (!cell || move === undefined) return;
  event.preventDefault();
  const layer = Math.max(0, Math.min(props.value.num - 1, Number(cell.dataset.layer) + move));
  props.value = {...props.value, at: layer};
  focusOn(layer);
});
"""


def layer_strip(value: dict[str, Any], elem_id: str) -> gr.HTML:
    """Make one button per layer, switched by clicks; the arrow keys move along."""
    return gr.HTML(value, label="Layers", html_template=STRIP_HTML, js_on_load=STRIP_JS, elem_id=elem_id)


def strip_value(
    studio: Studio, on: Iterable[int], vitality: dict[int, float] | None = None
) -> dict[str, Any]:
    """Make the value of a `layer_strip`: the layers that are on, and known vitalities."""
    known = vitality or {}
    return {
        "num": studio.spec.num_layers,
        "double": studio.spec.params.depth,
        "on": sorted(on),
        "vitality": {str(layer): value for layer, value in known.items()} if known else None,
        "top": max([*known.values(), 1e-6]),
    }
