"""The viewer of edits: before and after as one image, under a divider that a mouse, a finger or keys move."""

import html
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import FileData
from PIL import Image

from flux.images.io import read_image

VIEWER_HTML = """${value ? `<figure class="compare" style="--at: ${value.at}%; --ratio: ${value.ratio}">
  <div class="pair">
    ${value.before ? `<img src="${value.before.url}" alt="${value.tags[0]}: ${value.before_shows}">` : ""}
    <img class="${value.before ? "after" : ""}" src="${value.after.url}"
      alt="${value.before ? `${value.tags[1]}: ` : ""}${value.after_shows}">
    ${value.mask ? `<img class="mask" src="${value.mask.url}" alt="" hidden>` : ""}
    ${value.before ? `<span class="tag">${value.tags[0]}</span><span class="tag right">${value.tags[1]}</span>
    <input type="range" min="0" max="100" value="${value.at}"
      aria-label="Divider. On its left: ${value.tags[0]}. On its right: ${value.tags[1]}">` : ""}
  </div>
  <figcaption>
    <span>${value.after_shows}</span>
    ${value.mask ? `<label><input type="checkbox"> Dim what had to stay</label>` : ""}
    <button type="button" class="enlarge">Open large</button>
  </figcaption>
</figure>` : `<p class="nothing">${placeholder}</p>`}"""

VIEWER_JS = """
element.addEventListener("input", ({target}) => {
  const figure = element.querySelector("figure");
  if (target.type === "range") figure.style.setProperty("--at", `${target.value}%`);
  else figure.querySelector(".mask").hidden = !target.checked;
});
element.addEventListener("click", ({target}) => {
  const images = [...element.querySelectorAll(".pair img:not(.mask)")].reverse();
  if (target.closest(".enlarge, .pair > img")) studio.enlarge(images);
});
"""


def viewer(elem_id: str, value: dict[str, Any] | None, placeholder: str = "") -> gr.HTML:
    """Make a viewer. It shows an `image_alone` or a `pair`; while its value is None, the placeholder."""
    return gr.HTML(
        value,
        label="Viewer",
        html_template=VIEWER_HTML,
        js_on_load=VIEWER_JS,
        elem_id=elem_id,
        elem_classes="viewer",
        placeholder=placeholder,
    )


def image_alone(path: Path, shows: str) -> dict[str, Any]:
    """Make the value of a `viewer` that shows one image, and say what the image shows."""
    with Image.open(path) as image:
        ratio = image.width / image.height
    # The template puts texts into attributes as they are.
    value = {"after": _served(path), "after_shows": html.escape(shows), "ratio": ratio}
    return {"before": None, "before_shows": "", "mask": None, "tags": None, "at": 0, **value}


def pair(
    before: Path,
    before_shows: str,
    after: Path,
    after_shows: str,
    mask: Path | None = None,
    tags: tuple[str, str] = ("Before", "After"),
) -> dict[str, Any]:
    """Make the value of a `viewer` that shows an edit over its reference.

    Args:
        before: The reference.
        before_shows: The reference's prompt.
        after: The edit.
        after_shows: The edit's prompt.
        mask: White where the edit may change the reference. If None, no such mask was found.
        tags: What stands on the images.
    """
    return {
        **image_alone(after, after_shows),
        "before": _served(before),
        "before_shows": html.escape(before_shows),
        "mask": mask and _served(mask),
        "tags": list(tags),
        "at": divider(read_image(before), read_image(after)),
    }


def divider(before: Image.Image, after: Image.Image) -> int:
    """Find where a divider shows the change best: it has half of all differences on either side.

    Returns:
        The place from the left edge, in percent of the width, from 5 to 95.
    """
    small = (np.asarray(image.convert("RGB").resize((100, 100)), float) for image in (before, after))
    columns = np.abs(np.subtract(*small)).mean(axis=(0, 2)) ** 2
    if not columns.any():
        return 50
    return int(np.clip(np.searchsorted(columns.cumsum(), columns.sum() / 2) + 1, 5, 95))


def _served(path: Path) -> dict[str, Any]:
    """Describe a file as gradio does, so that the page gets its address."""
    return FileData(path=str(path), orig_name=path.name).model_dump()
