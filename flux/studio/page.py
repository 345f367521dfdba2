"""The page: its tabs, what was made in this visit below them, and how it looks."""

from pathlib import Path
from typing import Any

import gradio as gr

from flux.errors import InputError
from flux.settings.demos import EditSettings, LayerSettings, GenerateSettings
from flux.studio.endpoints import add_endpoints
from flux.studio.hardening import Page
from flux.studio.sessions import Run, Visit, read_back
from flux.studio.state import Studio
from flux.studio.tabs.common import AT_ONCE
from flux.studio.tabs.edit import EditTab
from flux.studio.tabs.generate import GenerateTab
from flux.studio.tabs.scan import LookTab

STYLE = Path(__file__).with_name("studio.css")
ACCENT = gr.themes.Color(
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
SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def LOOKS() -> dict[str, Any]:
    """Theme and style, for `launch`. No font and no script comes from another host."""
    theme = gr.themes.Base(
        primary_hue=ACCENT,
        neutral_hue="stone",
        radius_size="md",
        font=SYSTEM,
        font_mono=("ui-monospace", "monospace"),
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    return {"theme": theme, "css": STYLE.read_text(encoding="utf-8")}


class History:
    """The pictures of this visit, and the way back to how each was made."""

    def __init__(self, studio: Studio):
        self.studio = studio
        with gr.Column(elem_classes="history"):
            with gr.Row(elem_classes="heading"):
                gr.Markdown("### This visit")
                self.zip = gr.Button("Save all as ZIP", size="sm", elem_id="zip", scale=0, min_width=140)
                self.file = gr.DownloadButton("ZIP", visible="hidden", elem_id="zip-file")
            self.gallery = gr.Gallery(
                label="Pictures of this visit",
                show_label=False,
                columns=10,
                fit_columns=False,
                allow_preview=False,
                interactive=False,
                elem_id="history",
                object_fit="cover",
                height="auto",
                buttons=[],
            )
            self.drop = gr.File(
                label="Settings back from a picture or run.json",
                file_count="single",
                file_types=[".png", ".jpg", ".jpeg", ".json"],
                type="filepath",
                height=84,
                elem_id="drop",
            )
        self.components = [self.gallery]

    def shown(self, visit: Visit) -> dict:
        return {self.gallery: [(str(path), run.captions[name]) for run, name, path in visit.pictures()]}

    def wire(self, tabs: gr.Tabs, rooms: dict[type, Any]) -> None:
        """`rooms`: by the class of settings, the id of the tab that they return to, and the tab."""
        components = [tabs, *dict.fromkeys(part for _, room in rooms.values() for part in room.returned)]

        def again(request: gr.Request, event: gr.SelectData) -> dict:
            visit = self.studio.visits.of(request.session_hash)
            pictures = visit.pictures()
            if event.index >= len(pictures):
                raise InputError("That picture is no longer here: a visit's are deleted a day after its use")
            run, name, path = pictures[event.index]
            return self.back(rooms, tabs, *read_back(path), run=run, name=name)

        def dropped(path: str | None) -> dict:
            if not path:
                return {tabs: gr.skip()}
            settings, about = read_back(Path(path))
            if settings.model != self.studio.defaults.model:
                gr.Warning(f"This was made with {settings.model}; here {self.studio.defaults.model} draws.")
            if getattr(settings, "photo", None) or getattr(settings, "image", None):
                gr.Info("It began with a picture that is not in the file: upload that again.")
            return self.back(rooms, tabs, settings, about)

        def pack(request: gr.Request) -> str:
            return str(self.studio.visits.of(request.session_hash).zip())

        self.gallery.select(again, None, components, **AT_ONCE)
        self.drop.upload(dropped, self.drop, components, **AT_ONCE)
        packed = self.zip.click(pack, None, self.file, **AT_ONCE)
        packed.success(
            None, None, None, js="() => setTimeout(() => document.querySelector('#zip-file').click(), 300)"
        )

    def back(
        self, rooms: dict, tabs: gr.Tabs, settings: Any, about: dict, run: Run | None = None, name: str = ""
    ):
        """The form filled with these settings, and the run's picture shown if it is one of this visit."""
        number, room = rooms[type(settings)]
        inputs = {}
        for field in ("image", "photo"):
            if run and getattr(settings, field, None):
                inputs[field] = run.folder / getattr(settings, field)
        if getattr(settings, "mask", None):
            gr.Info("Its mask is not brought back: paint it again.")
        shown = room.restored(settings, about, **inputs)
        return {tabs: gr.Tabs(selected=number), **shown, **(room.again(run, name) if run else {})}


def build(studio: Studio) -> gr.Blocks:
    """The whole page, ready to be launched with `LOOKS()`."""
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
            with gr.Tab("Look inside", id="look"):
                look = LookTab(studio)
        history = History(studio)
        for tab in (generate, edit, look):
            tab.wire(history)
        look.wire_sending(tabs, edit)
        history.wire(
            tabs,
            {
                GenerateSettings: ("generate", generate),
                EditSettings: ("edit", edit),
                LayerSettings: ("look", look),
            },
        )
        add_endpoints(studio)
    return page
