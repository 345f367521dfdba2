"""The named HTTP endpoints. `flux.studio` documents what each takes and returns."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio import FileData
from gradio.events import api
from gradio.utils import get_upload_folder
from PIL import Image

from flux.conditions.kontext import kontext_size
from flux.errors import InputError
from flux.studio.forms import (
    edit_settings,
    fill_settings,
    generate_settings,
    instruct_settings,
    scan_settings,
    warnings_about,
)
from flux.studio.models import about_model
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.work.edit import known_layers, run_edit
from flux.studio.work.fill import run_fill
from flux.studio.work.generate import run_generate, steering_images
from flux.studio.work.scan import run_scan, steered_scan

R = TypeVar("R")
ENDPOINT = "endpoint"  # of a job that no tab started
Upload = FileData | None
Answer = tuple[list[FileData], FileData, list[str]]


def add_endpoints(studio: Studio) -> None:
    """Add the endpoints of what the models can do to the page that is being built."""
    every = Endpoints(studio)
    api(every.models, concurrency_limit=None)
    for name in dict.fromkeys(name for each in studio.models.values() for name in endpoints_of(each)):
        api(getattr(every, name), concurrency_limit=None)


def endpoints_of(studio: Studio) -> tuple[str, ...]:
    """Name the endpoints of what a model can do."""
    kind = studio.spec.condition
    drawing = (
        ("fill",) if kind == "fill" else ("generate", "instruct") if kind == "kontext" else ("generate",)
    )
    return (*drawing, "edit", "scan")


class Endpoints:
    """The endpoints. Gradio reads their names, fields and documentation from these methods."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def _asked(self, endpoint: str, arguments: Mapping[str, Any]) -> tuple[Studio, dict[str, Any]]:
        """Split the arguments of a call: its model says which studio, all others are a form.

        Without a model, it is the first that can do what is asked.

        Raises:
            InputError: There is no such model, or it cannot do it.
        """
        form = {name: value for name, value in arguments.items() if name not in ("self", "request")}
        able = {name: each for name, each in self.studio.models.items() if endpoint in endpoints_of(each)}
        model = form.pop("model") or next(iter(able))
        if not isinstance(model, str) or model not in able:
            raise InputError(f"Got model {model!r:.60} for /{endpoint}, expected {' or '.join(able)}")
        return able[model], form

    def _needed(self, data: Any, is_mask: bool = False) -> Image.Image:
        return self.studio.limits.read_upload(data, Path(get_upload_folder()), is_mask)

    def _upload(self, data: Any, is_mask: bool = False) -> Image.Image | None:
        return None if data is None else self._needed(data, is_mask)

    def _steering(self, studio: Studio, form: dict[str, Any], mask: Any) -> dict[str, Image.Image]:
        """Read the images of a call that steer its run, by field. One to fill gives the form its size.

        Raises:
            InputError: An image was not uploaded, or one to fill has no mask.
        """
        given = {name: self._needed(form[name]) for name in ("control", "fill") if form[name] is not None}
        if "fill" in given:
            if mask is None:
                raise InputError("Got fill without a mask: give an image, white where it is painted anew")
            given["mask"] = self._needed(mask, is_mask=True)
            form["width"], form["height"] = studio.limits.fill_size(given["fill"].size)
        return given

    def _in_turn(self, request: gr.Request, work: Callable[[Session], Iterator[R]]) -> R:
        """Wait for the caller's turn, do the work, and return its last update."""
        caller, last = request.session_hash or "", None
        address = getattr(getattr(request, "client", None), "host", "")
        self.studio.callers.admit(caller, address, is_event=True)
        with self.studio.turn(caller, ENDPOINT, address) as (job, session, waiting):

            def updates() -> Generator[Any, None, None]:
                yield from waiting
                if not job.stop.is_set():
                    yield from work(session)

            for update in (running := updates()):
                last = update
                if self.studio.callers.is_gone(caller):
                    running.close()
                    raise InputError("Nobody waits for this run any more")
            if job.stop.is_set() or last is None:
                raise InputError("The run was cancelled")
        return last

    def models(self) -> list[dict[str, Any]]:
        """The models: name, what each does, its endpoints, and whether it is in memory."""
        return [
            {
                "model": name,
                "about": about_model(studio.spec),
                "endpoints": [f"/{endpoint}" for endpoint in endpoints_of(studio)],
                "is_loaded": studio.engine.is_loaded,
            }
            for name, studio in self.studio.models.items()
        ]

    def generate(
        self,
        request: gr.Request,
        prompt: str,
        seed: int = 0,
        count: int = 1,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompt: str = "",
        image: Upload = None,
        strength: float = 0.8,
        control: Upload = None,
        redux: Upload = None,
        redux_strength: float = 1.0,
        model: str | None = None,
    ) -> Answer:
        """Images from a prompt, the run.json that makes them again, and warnings."""
        studio, form = self._asked("generate", locals())
        settings = generate_settings(studio, form)

        def work(session: Session) -> Iterator[tuple[Any, Run]]:
            given = {"control": self._upload(control), "redux": self._upload(redux)}
            read = {kind: image for kind, image in given.items() if image}
            steering = steering_images(settings, read)
            return run_generate(studio, session, settings, self._upload(image), steering)

        _, run = self._in_turn(request, work)
        return _answer(run, warnings_about(studio, settings, form))

    def instruct(
        self,
        request: gr.Request,
        prompt: str,
        context: list[FileData],
        reference_strength: float = 1.0,
        seed: int = 0,
        count: int = 1,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompt: str = "",
        model: str | None = None,
    ) -> Answer:
        """Images that an instruction makes of context images, their run.json, and warnings."""
        studio, form = self._asked("instruct", locals())
        if not isinstance(context, list):
            raise InputError(f"context: expected a list of images, got {context!r:.60}")
        settings = instruct_settings(studio, form)
        images = [self._needed(each) for each in context]
        if width is None and height is None:
            width, height = kontext_size(*images[0].size, studio.spec.size)
            settings = instruct_settings(studio, {**form, "width": width, "height": height})
        steering = {"context": images}
        _, run = self._in_turn(
            request, lambda session: run_generate(studio, session, settings, steering=steering)
        )
        return _answer(run, warnings_about(studio, settings, form))

    def fill(
        self,
        request: gr.Request,
        prompt: str,
        image: FileData,
        mask: Upload = None,
        left: float = 0.0,
        right: float = 0.0,
        above: float = 0.0,
        below: float = 0.0,
        overlap: float = 0.01,
        seed: int = 0,
        count: int = 1,
        num_steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompt: str = "",
        model: str | None = None,
    ) -> Answer:
        """Images that a mask is filled in, or that are continued, their run.json, and warnings."""
        studio, form = self._asked("fill", locals())
        source = self._needed(image)
        settings = fill_settings(studio, {**form, "outpaint": mask is None}, source.size)
        painted = self._upload(mask, is_mask=True)
        _, run = self._in_turn(request, lambda session: run_fill(studio, session, settings, source, painted))
        return _answer(run, warnings_about(studio, settings, form))

    def edit(
        self,
        request: gr.Request,
        prompt: str,
        edits: list[str],
        seed: int = 0,
        layers: list[int] | None = None,
        photo: Upload = None,
        mask: Upload = None,
        dose: str | None = None,
        weight: float | None = None,
        inject_from: float | None = None,
        inject_until: float | None = None,
        parts: str | None = None,
        inversion: str | None = None,
        paste_back: bool = False,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompt: str = "",
        control: Upload = None,
        fill: Upload = None,
        model: str | None = None,
    ) -> Answer:
        """A reference and its edits, the run.json that makes them again, and warnings."""
        studio, form = self._asked("edit", locals())
        form["edits"] = as_lines("edits", edits)
        if layers is None:
            form["layers"], _ = known_layers(studio, studio.sessions.of(request.session_hash))
        given = self._steering(studio, form, mask)
        settings = edit_settings(studio, form)

        def work(session: Session) -> Iterator[tuple[Any, Run]]:
            painted, steering = self._upload(mask, is_mask=True), steering_images(settings, given)
            return run_edit(studio, session, settings, self._upload(photo), painted, steering)

        _, run = self._in_turn(request, work)
        return _answer(run, warnings_about(studio, settings, form))

    def scan(
        self,
        request: gr.Request,
        prompts: list[str],
        seed: int = 0,
        layers: list[int] | None = None,
        top: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        control: Upload = None,
        fill: Upload = None,
        mask: Upload = None,
        model: str | None = None,
    ) -> tuple[dict, FileData, list[str]]:
        """The contents of vital_layers.json, vitality.png, and warnings. Asked again, it resumes."""
        studio, form = self._asked("scan", locals())
        form["prompts"] = as_lines("prompts", prompts)
        if layers is None:
            form["layers"] = list(range(studio.spec.num_layers))
        given = self._steering(studio, form, mask)
        settings = steered_scan(scan_settings(studio, form), given)
        self._in_turn(request, lambda session: run_scan(studio, session, settings))
        folder = Path(settings.output_dir)
        found = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
        return found, _file(folder / "vitality.png"), warnings_about(studio, settings, form)


def as_lines(name: str, texts: Any) -> str:
    """Join a list of texts, one per line, as a form has them. Raise InputError for anything else."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: expected a list of texts, got {texts!r:.60}")
    return "\n".join(" ".join(text.splitlines()) for text in texts)


def _answer(run: Run, warnings: list[str]) -> Answer:
    return [_file(path) for path in run.images.values()], _file(run.record), warnings


def _file(path: Path) -> FileData:
    return FileData(path=str(path), orig_name=path.name)
