"""The page: its tabs, this session's images below them, and its theme."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from flux.settings.demos import GenerateSettings, LayerSettings
from flux.settings.edits import EditSettings
from flux.studio.endpoints import add_endpoints
from flux.studio.hardening import Page
from flux.studio.state import Studio
from flux.studio.tabs.edit import EditTab
from flux.studio.tabs.film import FilmTab
from flux.studio.tabs.generate import GenerateTab
from flux.studio.tabs.history import History, HistoryPlace
from flux.studio.tabs.scan import ScanTab

STYLE = Path(__file__).with_name("studio.css")
ACCENT = themes.Color(
    c50="#eef6fb",
    c100="#d9ebf5",
    c200="#b3d6ea",
    c300="#86bedd",
    c400="#5aa3cc",
    c500="#3186b4",
    c600="#1f6f9f",
    c700="#185a82",
    c800="#154a6a",
    c900="#123d57",
    c950="#0b2738",
    name="accent",
)
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def theme() -> dict[str, Any]:
    """Makes the arguments of gradio's `launch` for theme and style. No other host serves fonts or scripts."""
    base = themes.Base(
        primary_hue=ACCENT,
        neutral_hue="stone",
        radius_size="md",
        font=SYSTEM_FONTS,
        font_mono=("ui-monospace", "monospace"),
    )
    colours = base.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    return {"theme": colours, "css": STYLE.read_text(encoding="utf-8")}


def build(studio: Studio) -> Page:
    """Builds the whole page, ready to be launched with `theme()`."""
    with Page(title=f"Studio · {studio.defaults.model}", fill_width=True, delete_cache=(3600, 86400)) as page:
        gr.HTML(
            f'<header><h1>Studio</h1><span class="model">{studio.defaults.model}</span>'
            f'<span class="licence">{studio.spec.licence}</span></header>',
            elem_id="top",
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio)
            with gr.Tab("Edit", id="edit"):
                edit = EditTab(studio)
            with gr.Tab("Look inside", id="look"), gr.Tabs(elem_classes="inner"):
                with gr.Tab("Which layers matter", id="scan"):
                    scan = ScanTab(studio)
                with gr.Tab("Step by step", id="film"):
                    film = FilmTab(studio)
        history = History(studio)
        for tab in (generate, edit, film):
            tab.wire(history)
        scan.wire(tabs, edit)
        places = {
            GenerateSettings: HistoryPlace("generate", generate),
            EditSettings: HistoryPlace("edit", edit),
            LayerSettings: HistoryPlace("look", film),
        }
        history.wire(tabs, places)
        add_endpoints(studio)
    return page
