"""The parts that tabs for models steered by images share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.form_values import Form
from flux.studio.forms import notes_about
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.controls import RunControls
from flux.studio.tabs.fields import (
    FormFields,
    connect_notes,
    filled,
    guidance_fields,
    sampling_values,
    size_and_seed_fields,
)
from flux.studio.tabs.history import Files, History
from flux.studio.tabs.runs import RunButton
from flux.studio.tabs.shown import ShownRun
from flux.studio.visits import existing_file
from flux.studio.widgets import CONCURRENT, Changes


class SteeredTab(ABC):
    """A tab that draws with images. Each kind says which, and how they are shown beside the result.

    Attributes:
        name: The name of the tab, with which its elements' ids begin.
        fields: The components that a run's settings are read from, by name.
    """

    name: str
    fields: FormFields

    def __init__(self, studio: Studio):
        self.studio, self.controls = studio, RunControls(studio, self.name)

    # ---- what each kind says

    @abstractmethod
    def settings_of(self, form: Form) -> ResolvedGenerate:
        """Make the settings of a run. Raise InputError for values that cannot be used."""

    @abstractmethod
    def work(
        self, session: Session, settings: ResolvedGenerate, form: Form
    ) -> Iterator[tuple[Update[MadeImage], Run]]:
        """Do the run."""

    @abstractmethod
    def compared(self, run: Run, name: str) -> dict[str, Any]:
        """Make the viewer's value: an image of a run over what it was made of."""

    @abstractmethod
    def start_from(self, images: list[str]) -> Changes:
        """Put images, by their files, in the place of those that a run begins with."""

    @property
    @abstractmethod
    def begun_with(self) -> list[Component]:
        """The components that `start_from` changes."""

    # ---- components

    def add_prompt(self, value: str, label: str, button: str) -> FormFields:
        """Add the prompt, and the buttons that start and stop."""
        prompt = gr.Textbox(
            value,
            label=label,
            lines=2,
            max_length=self.studio.limits.letters,
            elem_id=f"{self.name}-prompt",
        )
        [self.go] = self.controls.add_buttons(button)
        return {"prompt": prompt}

    def add_outputs(self, status: str) -> None:
        """Add the status line, the viewer, and what is below it."""
        self.controls.add_status(status)
        placeholder = "The result appears here, beside what it was made of."
        further = "Continue from this image"
        self.shown = ShownRun(self.name, self.compared, placeholder=placeholder, further=further)

    def add_settings(self, has_size: bool) -> FormFields:
        """Add the fields of every run. Without a size, the image to begin with has it."""
        with gr.Accordion("Settings", open=False, elem_id=f"{self.name}-settings"):
            fields = size_and_seed_fields(self.studio, seed=7, has_size=has_size, has_count=True)
            return fields | guidance_fields(self.studio)

    # ---- events

    def connect(self, history: History) -> None:
        """Connect the events; `history` shows each new image."""

        def work(
            session: Session, settings: ResolvedGenerate, form: Form
        ) -> Iterator[tuple[Update[MadeImage], Changes]]:
            for update, run in self.work(session, settings, form):
                yield update, self.shown.follow(update, run)

        button = RunButton(self.controls, self.fields, self.settings_of, work, history)
        button.connect([self.go.click], self.shown.components)
        connect_notes(
            self.fields, lambda form: notes_about(self.studio, lambda _, form: self.settings_of(form), form)
        )

        further = self.shown.under.edit.click(
            lambda file: self.start_from([str(existing_file(file))]),
            self.shown.under.file,
            self.begun_with,
            **CONCURRENT,
        )
        further.then(None, None, None, js=f"() => studio.focus('#{self.name}-prompt textarea')")

    # ---- an earlier run

    @property
    def restorable(self) -> list[Component]:
        """The components that `restored` and `shown_again` change."""
        form = [field for name, field in self.fields.items() if name != "mask"]
        return list(dict.fromkeys([*form, *self.begun_with, *self.shown.components]))

    def restored(self, settings: GenerateSettings, details: Mapping[str, Any], files: Files) -> Changes:
        """Fill the form as for one image of these settings, or for all if `details` name none."""
        first = settings.prompts[0]
        values = sampling_values(self.studio, settings)
        values["prompt"] = details.get("prompt", first.prompt)
        values["seed"] = details.get("seed", first.seed)
        values["count"] = 1 if "prompt" in details else len(settings.prompts)
        return {**filled(self.fields, values), **self.restored_images(settings, files)}

    @abstractmethod
    def restored_images(self, settings: GenerateSettings, files: Files) -> Changes:
        """Bring back the images of a run, and what the settings say about them."""

    def shown_again(self, run: Run, name: str) -> Changes:
        """Show an image of this session once more."""
        return self.shown.show(run, name)
