"""The page's own components: the strip of layers, uploads that come in as bare pixels, the line of news."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.studio.engine import Report
from flux.studio.state import Studio

STRIP_HTML = """<div class="strip" role="toolbar" aria-label="Layers">
${[["double", 0, value.double], ["single", value.double, value.num]].map(([kind, from, to]) => `
  <div class="cells ${kind}" role="group" aria-label="${kind}-stream layers">
    <span class="kind">${kind}</span>
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


def strip_value(
    num: int, num_double: int, on: Any, vitality: dict[int, float] | None = None
) -> dict[str, Any]:
    """What a `layer_strip` holds: which layers are on, and how vital each is, if known."""
    top = max([*(vitality or {}).values(), 1e-6])
    shares = {str(layer): value for layer, value in vitality.items()} if vitality else None
    return {"num": num, "double": num_double, "on": sorted(on), "vitality": shares, "top": top}


def layers_on(value: Any, num: int) -> tuple[int, ...]:
    """The layers that are on in what a browser or a program sent. Raises InputError for others than those of
    a model that has `num`.
    """
    on = value.get("on") if isinstance(value, dict) else value
    known = isinstance(on, list | tuple) and all(type(layer) is int and 0 <= layer < num for layer in on)
    if not known:
        raise InputError(f"Got the layers {on!r:.60}, expected a list of numbers from 0 to {num - 1}")
    return tuple(sorted(set(on)))


def layer_strip(value: dict[str, Any], **more: Any) -> gr.HTML:
    """One button for each layer, to click on and off; the arrow keys walk along."""
    return gr.HTML(value, label="Layers", html_template=STRIP_HTML, js_on_load=STRIP_JS, **more)


def picture_input(studio: Studio, **more: Any) -> tuple[gr.Image, gr.State]:
    """A place to drop a picture on, and what holds the path of what came in: within the limits, upright, and
    nothing but pixels. None: nothing has.
    """
    # Never handed to a function by gradio, which would open whatever was uploaded.
    place = gr.Image(type="filepath", sources=["upload", "clipboard"], format="png", **more)
    held = gr.State(None)

    def take(request: gr.Request, upload: dict[str, Any]) -> str:
        picture = studio.limits.read_upload(upload, Path(get_upload_folder()))
        return str(studio.visits.of(request.session_hash).take(picture))

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    taken = place.upload(
        take,
        place,
        held,
        preprocess=False,
        concurrency_limit=None,
        show_progress="hidden",
        api_visibility="private",
    )
    taken.failure(lambda: (None, None), None, [place, held], **quiet)
    place.clear(lambda: None, None, held, **quiet)
    return place, held


def held_picture(path: str | None) -> Image.Image | None:
    """What a `picture_input` holds. Raises InputError if it has been deleted since."""
    if path is not None and not Path(path).is_file():
        raise InputError("Your picture is gone, a day after the visit's last use: upload it again")
    return path and read_image(path)


def mask_editor(**more: Any) -> gr.ImageEditor:
    """A picture to paint on, see `painted`."""
    brush = gr.Brush(default_size=24, colors=["#ffffff"], default_color="#ffffff", color_mode="fixed")
    return gr.ImageEditor(
        type="pil", format="png", sources=(), transforms=(), layers=False, brush=brush, **more
    )


def painted(value: dict[str, Any] | None) -> Image.Image | None:
    """What was painted in a `mask_editor`, white on black; None: nothing was."""
    alphas = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in (value or {}).get("layers") or ()]
    if not any(alpha.any() for alpha in alphas):
        return None
    return Image.fromarray(np.where(np.max(alphas, axis=0) > 0, 255, 0).astype(np.uint8))


def news(report: Report | None, idle: str = "") -> str:
    """A report as the line above the picture: a bar, and how long it will take."""
    if report is None:
        return f'<div class="news" role="status"><span>{html.escape(idle)}</span></div>'
    share = report.done / report.total if report.total else 0
    texts = [report.text]
    if report.total:
        texts.append(f"{report.done} of {report.total}")
    if report.left is not None:
        texts.append(f"{duration(report.left)} left")
    return (
        f'<div class="news busy" role="status"><i style="width:{100 * share:.1f}%"></i>'
        f"<span>{html.escape(' · '.join(texts))}</span></div>"
    )


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
