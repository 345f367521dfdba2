"""The header of a page: its model, and the other models of the studio."""

import html

from flux.studio.models import about_model
from flux.studio.state import Studio


def header(studio: Studio) -> str:
    """Render the header. With several models, the model's name opens a list of them."""
    name = html.escape(studio.defaults.model)
    model = f'<span class="model">{name}</span>'
    if len(studio.models) > 1:
        entries = "".join(_entry(other, other is studio) for other in studio.models.values())
        model = (
            f'<details class="models"><summary class="model" title="Choose another model">{name}</summary>'
            f"<div><ul>{entries}</ul>"
            "<p>A model is loaded when it is first used. Your images and what you typed stay.</p>"
            "</div></details>"
        )
    licence = f'<span class="licence">{html.escape(studio.spec.licence)}</span>'
    return f"<header><h1>Studio</h1>{model}{licence}</header>"


def _entry(studio: Studio, is_current: bool) -> str:
    """Render one model of the list. `studio.js` completes the address."""
    current = ' aria-current="page"' if is_current else ""
    return (
        f'<li><a href="./{studio.page}" data-page="{studio.page}"{current}>'
        f"{html.escape(studio.defaults.model)}<span>{html.escape(about_model(studio.spec))}</span></a></li>"
    )
