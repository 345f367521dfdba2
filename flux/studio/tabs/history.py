"""The images of this session, and the way back from an image to the settings that made it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gradio as gr
from gradio.components import Component
from PIL import Image

from flux.errors import InputError
from flux.images.masks import read_mask
from flux.settings.demos import GenerateSettings, ModelSettings, PromptSettings
from flux.settings.edits import INHERITED, EditSettings
from flux.studio.hardening import toast
from flux.studio.sessions import Run, Session, read_back
from flux.studio.state import Studio
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import FormFields
from flux.studio.visits import GONE, existing_file, unpack_mask
from flux.studio.widgets import CONCURRENT, Changes, results, status_html

INPUTS = ("image", "photo", "context", "fill", "control", "redux")
"""Fields of settings that name uploaded images."""
SETTLED = {*ModelSettings.model_fields, *INPUTS, "mask", "outpaint", "prompts", "vital_layers", "parallel"}
"""Fields of settings that the page shows in its own way, or that are the operator's."""


class RestorableTab(Protocol):
    """A tab whose form can be filled again from the settings of an earlier run.

    Attributes:
        controls: Its buttons and status line.
        fields: The components that a run's settings are read from, by name.
    """

    controls: RunControls
    fields: FormFields

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        ...

    def restored(self, settings: Any, details: Mapping[str, Any], files: "Files") -> Changes:
        """Fill the form with these settings.

        Args:
            settings: The settings of an earlier run.
            details: What an image says of itself, as far as it has them: "prompt", "seed" and "layers".
            files: The images that come with it.
        """
        ...

    def shown_again(self, run: Run, name: str) -> Changes:
        """Show an image of this session once more."""
        ...


@dataclass(frozen=True)
class Files:
    """The images that come back with a run's settings.

    Attributes:
        inputs: The images that the run began with, by the field that names them, if they are in this session.
        mask: The mask that was painted, white where edits may change the reference.
        shown: An image to paint a mask on.
    """

    inputs: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    mask: Image.Image | None = None
    shown: Path | None = None

    @classmethod
    def beside(cls, path: Path, settings: ModelSettings, shown: Path | None = None) -> "Files":
        """Find the files of a run beside one of its images.

        Args:
            path: The image.
            settings: The run's settings.
            shown: As the attribute. If None, the image.
        """
        mask = path.with_name("mask.png")
        return cls(
            inputs={name: _inputs(settings, name, path.parent) for name in INPUTS},
            mask=read_mask(mask) if mask.is_file() else None,
            shown=shown or path,
        )

    def all_of(self, name: str) -> tuple[Path, ...]:
        """The images of a field."""
        return self.inputs.get(name, ())

    def one_of(self, name: str) -> str | None:
        """The file of a field's first image, as components take it. None if there is none."""
        return next((str(path) for path in self.all_of(name)), None)


@dataclass(frozen=True, eq=False)
class HistoryPlace:
    """A tab to return to, and which tab of each row of tabs must be open to see it."""

    opened: Mapping[gr.Tabs, str]
    tab: RestorableTab


class History:
    """The images of this session; a click on one, or an upload of a saved one, brings its settings back."""

    def __init__(self, studio: Studio):
        self.studio = studio
        with gr.Column(elem_classes="history"):
            with gr.Row(elem_classes="heading"):
                gr.Markdown("## Your images")
                self.zip = gr.Button("Save all as ZIP", size="sm", elem_id="zip", scale=0, min_width=140)
                self.file = gr.DownloadButton("ZIP", visible="hidden", elem_id="zip-file")
            self.gallery = results("Your images", "history", columns=10)
            self.drop = gr.File(
                label="Bring settings back: drop a saved image or run.json",
                file_count="single",
                file_types=[".png", ".jpg", ".jpeg", ".json"],
                type="filepath",
                height=84,
                elem_id="drop",
            )
        # An image that another model made: where it is shown, and which one this page was opened for.
        self.elsewhere = gr.Textbox(visible="hidden", label="Elsewhere")
        self.wanted = gr.Textbox(visible="hidden", label="Wanted")
        self.bring = gr.Button("Bring", visible="hidden", elem_id="bring")

    def changes(self, session: Session) -> Changes:
        """Show all images of the session."""
        images = [(str(path), run.captions[name]) for run, name, path in session.images()]
        return {self.gallery: gr.update(value=images, visible=bool(images))}

    def connect(self, places: Mapping[str, HistoryPlace]) -> None:
        """Let images and files bring settings back to their tab. The tabs are named as by `_place_of`."""
        self._places = places
        every = list(places.values())
        rows = [row for place in every for row in place.opened]
        components = [part for place in every for part in (place.tab.controls.status, *place.tab.restorable)]
        outputs = list(dict.fromkeys([self.elsewhere, *rows, *components]))
        for event in (
            self.gallery.select(self._select, None, outputs, **CONCURRENT),
            self.drop.upload(self.dropped, self.drop, outputs, **CONCURRENT),
            self.bring.click(self._bring, self.wanted, outputs, js="() => [studio.wanted()]", **CONCURRENT),
        ):
            event.success(None, self.elsewhere, None, js="elsewhere => { studio.look(elsewhere); }")
        packed = self.zip.click(self.pack, None, self.file, **CONCURRENT)
        packed.success(
            None, None, None, js="() => setTimeout(() => document.querySelector('#zip-file').click(), 300)"
        )

    # ---- events

    def _select(self, request: gr.Request, event: gr.SelectData) -> Changes:
        """Show an image that was clicked, or say on which page it is shown."""
        images = self.studio.sessions.of(request.session_hash).images()
        if event.index >= len(images):
            raise InputError(GONE)
        run, name, path = images[event.index]
        maker = self.studio.models.get(run.settings.model, self.studio)
        if maker is not self.studio:
            return {self.elsewhere: json.dumps({"page": maker.page, "image": _title(run, name)})}
        return self._show(run, name, path)

    def _bring(self, request: gr.Request, wanted: str) -> Changes:
        """Show the image for which the page was opened."""
        images = self.studio.sessions.of(request.session_hash).images()
        found = next((image for image in images if _title(*image[:2]) == wanted), None)
        if found is None:
            raise InputError(GONE)
        return self._show(*found)

    def dropped(self, path: str | None) -> Changes:
        """Bring back the settings in a file, and say what is not in it."""
        if not path:
            return {self.elsewhere: gr.skip()}
        settings, details = read_back(Path(path))
        if settings.model != self.studio.defaults.model:
            further = ": choose it above, then drop this again" * (settings.model in self.studio.models)
            toast(
                gr.Warning,
                f"This was made with {settings.model}, not with {self.studio.defaults.model}{further}.",
            )
        if any(getattr(settings, name, None) for name in INPUTS):
            toast(gr.Info, "It began with an image that is not in the file: upload that again.")
        mask = unpack_mask(details["mask"]) if "mask" in details else None
        if getattr(settings, "mask", None) and mask is None:
            toast(gr.Info, "Its mask is not in the file: paint it again.")
        if absent := without_field(settings, self._place_of(settings).tab.fields):
            toast(gr.Warning, f"Left out, as this page has no field for it: {', '.join(absent)}.")
        shown = None if path.endswith(".json") else Path(path)
        return self._restored(settings, details, Files(mask=mask, shown=shown))

    def pack(self, request: gr.Request) -> str:
        """Write all images of this session into one file, and name it."""
        return str(self.studio.sessions.of(request.session_hash).zip())

    # ---- a run shown again

    def _show(self, run: Run, name: str, path: Path) -> Changes:
        """Show an image of this session, and fill the form of its tab."""
        settings, details = read_back(existing_file(path))
        files = Files.beside(path, settings, run.images.get("reference"))
        tab = self._place_of(settings).tab
        status = {tab.controls.status: status_html("From your images.")}
        return {**status, **self._restored(settings, details, files), **tab.shown_again(run, name)}

    def _restored(self, settings: ModelSettings, details: Mapping[str, Any], files: Files) -> Changes:
        """Open the tab of these settings, and fill its form."""
        place = self._place_of(settings)
        opened = {row: gr.Tabs(selected=tab) for row, tab in place.opened.items()}
        return {self.elsewhere: "", **opened, **place.tab.restored(settings, details, files)}

    def _place_of(self, settings: ModelSettings) -> HistoryPlace:
        """Find the tab that runs of this kind are made in.

        Raises:
            InputError: This model has none.
        """
        name = settings.demo
        if isinstance(settings, GenerateSettings):
            name = "generate"
            if self.studio.has_own_lora(settings):
                name = "lora"
            elif settings.context or settings.fill:
                name = "instruct" if settings.context else "fill"
        if name not in self._places:
            raise InputError(
                f"Got settings of {settings.model}; this page is of {self.studio.defaults.model}, which has "
                "no tab for them"
            )
        return self._places[name]


def without_field(settings: ModelSettings, fields: Collection[str]) -> list[str]:
    """List what a run did otherwise than usual, and for which a tab has no field.

    Args:
        settings: The settings of a run.
        fields: The names of the tab's fields.
    """
    shown = {*fields, *SETTLED}
    usual = {name: field.default for name, field in type(settings).model_fields.items() if name not in shown}
    absent = [name for name, value in usual.items() if getattr(settings, name) != value]
    if isinstance(getattr(settings, "weight", None), dict):
        absent.append("strengths by layer")
    if isinstance(settings, EditSettings):
        shared = {name: getattr(settings, name) for name in INHERITED}
        own = (getattr(entry, name) != value for entry in settings.entries for name, value in shared.items())
        absent += ["settings of single edits"] * any(own)
    if isinstance(settings, PromptSettings) and len({entry.prompt for entry in settings.prompts}) > 1:
        absent.append("the prompts after the first")
    return absent


def _inputs(settings: ModelSettings, name: str, folder: Path) -> tuple[Path, ...]:
    """List the files in a run's folder that a field of its settings names."""
    named = getattr(settings, name, None) or ()
    return tuple(folder / each for each in ([named] if isinstance(named, str) else named))


def _title(run: Run, name: str) -> str:
    """Name an image of a visit in one text."""
    return f"{run.folder.name}/{name}"
