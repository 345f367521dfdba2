"""The page: its tabs, this session's images below them, and its theme."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from flux.studio.endpoints import add_endpoints
from flux.studio.hardening import Page
from flux.studio.header import header
from flux.studio.sessions import Run
from flux.studio.state import Studio
from flux.studio.tabs.edit import EditTab
from flux.studio.tabs.fill import FillTab
from flux.studio.tabs.film import FilmTab
from flux.studio.tabs.generate import GenerateTab
from flux.studio.tabs.history import History, HistoryPlace
from flux.studio.tabs.instruct import InstructTab
from flux.studio.tabs.lora import LoraTab
from flux.studio.tabs.scan import ScanTab
from flux.studio.visits import EXAMPLE, continue_visit, shown_run
from flux.studio.widgets import CONCURRENT, UNQUEUED, Changes
from flux.studio.words import list_of_words

STYLE, SCRIPT = (Path(__file__).with_name(f"studio.{kind}") for kind in ("css", "js"))
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
    """Make the arguments of gradio's `launch` for theme and style. No other host serves fonts or scripts."""
    base = themes.Base(
        primary_hue=ACCENT,
        neutral_hue="stone",
        radius_size="md",
        font=SYSTEM_FONTS,
        font_mono=("ui-monospace", "monospace"),
    )
    # Text and buttons have a contrast of 4.5 and more.
    colours = base.set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_300",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited_dark="*primary_300",
        link_text_color_active_dark="*primary_200",
    )
    script = SCRIPT.read_text(encoding="utf-8")
    return {"theme": colours, "css": STYLE.read_text(encoding="utf-8"), "head": f"<script>{script}</script>"}


def build(studio: Studio) -> Page:
    """Build the page of each model, ready to be launched with `theme()`.

    The first model's page is at the root of the server, each other one at the model's name.
    """
    first, *others = studio.models.values()
    with Page(title=f"Studio · {first.defaults.model}", fill_width=True, delete_cache=(3600, 86400)) as page:
        _add_model(page, first)
        add_endpoints(studio)
    for other in others:
        with page.route(other.page, other.page, show_in_navbar=False):
            _add_model(page, other)
    return page


def _add_model(page: gr.Blocks, studio: Studio) -> None:
    """Add the page of one model."""
    with gr.Row(elem_id="top"):
        gr.HTML(header(studio))
        undo = gr.Button("Undo", size="sm", elem_id="undo", scale=0, min_width=80)
    first = {"kontext": "instruct", "fill": "fill", "control": "generate"}.get(
        studio.spec.condition or "", "edit"
    )
    with gr.Tabs(elem_id="tabs", selected=first) as row:
        tabs, places = _add_tabs(studio, row)
    history = History(studio)
    gr.HTML(list_of_words(), elem_id="words")
    for name, tab in tabs.items():
        if name != "scan":
            tab.connect(history)
    tabs["scan"].connect(row, tabs["edit"])
    _connect_edit_this(
        [tabs[name] for name in ("generate", "lora", "film") if name in tabs], row, tabs["edit"]
    )
    history.connect(places)
    _connect_memory(page, undo, tabs)
    _connect_visit(page, studio, history)


def _add_tabs(studio: Studio, row: gr.Tabs) -> tuple[dict[str, Any], dict[str, HistoryPlace]]:
    """Add the tabs of what a model can do.

    Returns:
        The tabs by name, and the places where the history brings settings back.
    """
    example, kind, tabs = _example(studio), studio.spec.condition, dict[str, Any]()
    # Where a small model needs an image, one is there.
    first = example.images["reference"] if studio.spec.folder else None
    opened, places = list[gr.Tab](), dict[str, HistoryPlace]()

    def add(name: str, title: str, make: Callable[[], Any]) -> None:
        with gr.Tab(title, id=name) as place:
            tabs[name] = make()
        opened.append(place)
        places[name] = HistoryPlace({row: name}, tabs[name])

    if kind == "fill":
        add("fill", "Fill", lambda: FillTab(studio, first))
    else:
        add("generate", "Generate", lambda: GenerateTab(studio, example))
    if kind == "kontext":
        add("instruct", "Edit by instruction", lambda: InstructTab(studio, first))
    add("edit", "Edit", lambda: EditTab(studio, example))
    add("lora", "LoRA", lambda: LoraTab(studio, first))
    with gr.Tab("Look inside", id="look") as look_place, gr.Tabs(elem_classes="inner") as inner:
        with gr.Tab("Which layers matter", id="scan") as scan_place:
            tabs["scan"] = ScanTab(studio, first)
        with gr.Tab("Step by step", id="film") as film_place:
            tabs["film"] = FilmTab(studio, first)
    places["layer"] = HistoryPlace({row: "look", inner: "film"}, tabs["film"])
    _connect_addresses(*opened, look_place, scan_place, film_place)
    return tabs, places


def _example(studio: Studio) -> Run:
    """Copy the example to where it is served from for good: gradio's own copies are deleted after a day."""
    folder = studio.folder / "example"
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    gr.set_static_paths([folder])
    return shown_run(folder)


def _connect_edit_this(tabs: Iterable[GenerateTab | LoraTab | FilmTab], row: gr.Tabs, edit: EditTab) -> None:
    """Let the button under an image of another tab make it the reference of edits."""

    def take(file: str) -> Changes:
        return {row: gr.Tabs(selected="edit"), **edit.take(file)}

    for tab in tabs:
        taken = tab.under.edit.click(take, tab.under.file, [row, *edit.restorable], **CONCURRENT)
        taken.success(None, None, None, js="() => studio.focus('#edit-edits textarea')")


def _connect_addresses(*places: gr.Tab) -> None:
    """Write the tab that is open into the page's address."""
    for place in places:
        place.select(None, None, None, js=f"() => studio.opened({json.dumps(place.id)})")


def _connect_memory(page: gr.Blocks, undo: gr.Button, tabs: Mapping[str, Any]) -> None:
    """Let the browser remember what the forms say, and undo the last change of them.

    It holds no images: uploads and masks are the server's, and come back with an item of the history.
    """
    kept = {
        f"{name}.{field}": component
        for name, tab in tabs.items()
        for field, component in tab.fields.items()
        if not isinstance(component, gr.State) and field not in ("source", "mask")
        if component is not tabs["lora"].sliders  # they are an upload's
    }
    names, fields = json.dumps(list(kept)), list(kept.values())
    changes = [field.change for field in fields]
    gr.on(changes, None, fields, None, js=f"(...values) => {{ studio.remember({names}, values); }}")
    undo.click(None, fields, fields, js=f"(...values) => studio.undo({names}, values)")
    recalled = page.load(None, fields, fields, js=f"(...values) => studio.recall({names}, values)")
    recalled.then(None, None, None, js="() => { studio.go(); }")


def _connect_visit(page: gr.Blocks, studio: Studio, history: History) -> None:
    """Let a page that is opened again, by the same browser, go on with its visit."""
    visit = gr.Textbox(visible="hidden", label="Visit")

    def join(request: gr.Request, name: str) -> Changes:
        return history.changes(continue_visit(studio.sessions, request.session_hash, name))

    joined = page.load(join, visit, history.gallery, js="() => [studio.visit()]", **UNQUEUED)
    joined.success(None, None, None, js="() => { studio.bring(); }")
