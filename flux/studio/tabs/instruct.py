"""The tab that edits by instruction, for models that take context images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from flux.conditions.kontext import kontext_size
from flux.errors import InputError
from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.form_values import MOST_STRENGTH, Form
from flux.studio.forms import instruct_settings
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.tabs.fields import SMALLEST, Examples, FormFields, filled
from flux.studio.tabs.history import Files
from flux.studio.tabs.source import ImageSource
from flux.studio.tabs.steered import SteeredTab
from flux.studio.viewer import pair
from flux.studio.widgets import UNQUEUED, Changes, held_image, results
from flux.studio.words import about
from flux.studio.work.generate import run_generate

MOST_SHARED = 10  # steps that share one computation of the context
EXAMPLES = ("make it night", "add a top hat", "replace the dog with a cat")


class InstructTab(SteeredTab):
    """The tab that edits by instruction."""

    name = "instruct"

    def __init__(self, studio: Studio, first: Path | None = None):
        """Add the tab. `first` is the context image that stands there at first."""
        super().__init__(studio)
        contexts = [str(first)] if first else []
        with gr.Row(elem_classes="workspace"):
            with gr.Column(elem_classes="inputs"):
                self.source = ImageSource(studio, "Add a context image", "instruct-image")
                self.thumbnails = results(
                    "Context images",
                    "instruct-contexts",
                    columns=3,
                    visible=bool(first),
                    value=_named(contexts),
                )
                self.clear = gr.Button("Remove all", size="sm", visible=bool(first))
                self.fields = {"context": gr.State(contexts)}
                self.fields |= self.add_prompt(EXAMPLES[0] if first else "", "Instruction", "Edit")
                self.examples = Examples.of([(text,) for text in EXAMPLES], EXAMPLES)
            with gr.Column(elem_classes="outputs"):
                self.add_outputs("Add an image, say what is to change, and press Edit.")
            with gr.Column(elem_classes="options"):
                self.fields["reference_strength"] = gr.Slider(
                    0,
                    MOST_STRENGTH,
                    1,
                    step=0.05,
                    label="Reference strength",
                    info=about("How clearly places of the context are told apart.", "context"),
                )
                self.fields |= {**self.add_settings(has_size=True), **_advanced()}
        self._connect_images()

    def _connect_images(self) -> None:
        """Let an image that is uploaded or taken join the others."""

        def add(file: str | None, files: list[str]) -> Changes:
            if file is None:
                return {self.source.held: gr.skip()}
            if len(files) >= (most := self.studio.limits.contexts):
                raise InputError(f"Got more than {most} context images: remove them first")
            return self.start_from([*files, file])

        joined = self.source.held.change(
            add,
            [self.source.held, self.fields["context"]],
            self.begun_with,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        joined.failure(lambda: (None, None), None, [self.source.upload, self.source.held], **UNQUEUED)
        self.examples.connect([self.fields["prompt"]])
        self.clear.click(lambda: self.start_from([]), None, self.begun_with, **UNQUEUED)

    @property
    def begun_with(self) -> list[Component]:
        """The components that `start_from` changes."""
        size = [self.fields["width"], self.fields["height"]]
        context = [self.fields["context"], self.thumbnails, self.clear]
        return [self.source.upload, self.source.held, *context, *size]

    def start_from(self, images: list[str]) -> Changes:
        """Make these files the context images, and size the run to the first one."""
        changes: Changes = {
            self.source.upload: None,
            self.source.held: None,
            self.fields["context"]: images,
            self.thumbnails: gr.update(value=_named(images), visible=bool(images)),
            self.clear: gr.update(visible=bool(images)),
        }
        if images:
            size = kontext_size(*held_image(images[0]).size, self.studio.spec.size)
            width, height = (max(SMALLEST, side) for side in size)
            changes |= {self.fields["width"]: width, self.fields["height"]: height}
        return changes

    def settings_of(self, form: Form) -> ResolvedGenerate:
        """Make the settings of a run. Raise InputError for values that cannot be used."""
        return instruct_settings(self.studio, form)

    def work(
        self, session: Session, settings: ResolvedGenerate, form: Form
    ) -> Iterator[tuple[Update[MadeImage], Run]]:
        """Do the run."""
        images = [held_image(file) for file in form["context"]]
        return run_generate(self.studio, session, settings, steering={"context": images})

    def compared(self, run: Run, name: str) -> dict[str, Any]:
        """Make the viewer's value: an image of a run over its first context image."""
        return pair(
            run.folder / "context_0.png", "the context image", run.images[name], run.captions[name], None
        )

    def restored_images(self, settings: GenerateSettings, files: Files) -> Changes:
        """Bring back the context images, the size, and how the context is seen."""
        values = {name: getattr(settings, name) for name in ("width", "height")}
        values["reference_strength"] = min(settings.reference_strength, MOST_STRENGTH)
        values["context_every"] = min(settings.context_every, MOST_SHARED)
        context = self.start_from([str(path) for path in files.all_of("context")])
        return {**context, **filled(self.fields, values)}


def _advanced() -> FormFields:
    """Make the field of a choice that few edits need, folded."""
    with gr.Accordion("Advanced", open=False, elem_id="instruct-advanced"):
        shared = gr.Slider(
            1,
            MOST_SHARED,
            1,
            step=1,
            label="Steps per look at the context",
            info="Above 1, steps are faster, and images change.",
        )
    return {"context_every": shared}


def _named(images: list[str]) -> list[tuple[str, str]]:
    """Name context images by their order."""
    return [(file, f"Context image {number + 1}") for number, file in enumerate(images)]
