"""The named HTTP endpoints. `flux.studio` documents what each takes and returns."""

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio import FileData
from gradio.events import api
from gradio.utils import get_upload_folder
from PIL import Image

from flux.conditions.kontext import kontext_size
from flux.errors import InputError
from flux.images.io import read_image
from flux.images.masks import read_mask
from flux.studio.forms import (
    SAMPLING,
    edit_settings,
    fill_settings,
    generate_settings,
    instruct_settings,
    scan_settings,
    warnings_about,
)
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.work.edit import known_layers, run_edit
from flux.studio.work.fill import run_fill
from flux.studio.work.generate import run_generate, steering_images
from flux.studio.work.scan import run_scan

R = TypeVar("R")
ENDPOINT = "endpoint"  # of a job that no tab started
Upload = FileData | None
Answer = tuple[list[FileData], FileData, list[str]]


def add_endpoints(studio: Studio) -> None:
    """Adds the endpoints of what the model can do to the page that is being built."""
    # A model is asked only for what it can do.
    every = Endpoints(studio)
    usual = (every.generate, every.edit, every.scan)
    of_kinds = {
        "kontext": (*usual, every.instruct),
        "fill": (every.fill,),
        "control": (every.generate,),
    }
    for endpoint in of_kinds.get(studio.spec.condition or "", usual):
        api(endpoint, concurrency_limit=None)


class Endpoints:
    """The endpoints. Gradio reads their names, fields and documentation from these methods."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def _needed(self, data: Any, read: Callable[[Path], Image.Image] = read_image) -> Image.Image:
        return self.studio.limits.read_upload(data, Path(get_upload_folder()), read)

    def _upload(self, data: Any, read: Callable[[Path], Image.Image] = read_image) -> Image.Image | None:
        return None if data is None else self._needed(data, read)

    def _in_turn(self, request: gr.Request, work: Callable[[Session], Iterator[R]]) -> R:
        """Waits for the caller's turn, does the work, and returns its last update."""
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
    ) -> Answer:
        """Images from a prompt, the run.json that makes them again, and warnings."""
        sampling = (width, height, num_steps, guidance, true_cfg, negative_prompt)
        form = dict(zip(SAMPLING, sampling, strict=True))
        form |= {"prompt": prompt, "seed": seed, "count": count, "strength": strength, "image": image}
        form |= {"control": control, "redux": redux, "redux_strength": redux_strength}
        settings = generate_settings(self.studio, form)

        def work(session: Session) -> Iterator[tuple[Any, Run]]:
            given = {"control": self._upload(control), "redux": self._upload(redux)}
            read = {kind: image for kind, image in given.items() if image}
            steering = steering_images(settings, read)
            return run_generate(self.studio, session, settings, self._upload(image), steering)

        _, run = self._in_turn(request, work)
        return _answer(run, warnings_about(self.studio, settings, form))

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
    ) -> Answer:
        """Images that an instruction makes of context images, their run.json, and warnings."""
        if not isinstance(context, list):
            raise InputError(f"context: expected a list of images, got {context!r:.60}")
        sampling = (width, height, num_steps, guidance, true_cfg, negative_prompt)
        form = dict(zip(SAMPLING, sampling, strict=True))
        form |= {"prompt": prompt, "seed": seed, "count": count, "context": context}
        form |= {"reference_strength": reference_strength}
        settings = instruct_settings(self.studio, form)
        images = [self._needed(each) for each in context]
        if width is None and height is None:
            width, height = kontext_size(*images[0].size, self.studio.spec.size)
            settings = instruct_settings(self.studio, {**form, "width": width, "height": height})
        steering = {"context": images}
        _, run = self._in_turn(
            request, lambda session: run_generate(self.studio, session, settings, steering=steering)
        )
        return _answer(run, warnings_about(self.studio, settings, form))

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
    ) -> Answer:
        """Images that a mask is filled in, or that are continued, their run.json, and warnings."""
        sampling = (None, None, num_steps, guidance, true_cfg, negative_prompt)
        form = dict(zip(SAMPLING, sampling, strict=True))
        form |= {"prompt": prompt, "seed": seed, "count": count, "outpaint": mask is None}
        form |= {"left": left, "right": right, "above": above, "below": below, "overlap": overlap}
        source = self._needed(image)
        settings = fill_settings(self.studio, form, source.size)
        painted = self._upload(mask, read_mask)
        _, run = self._in_turn(
            request, lambda session: run_fill(self.studio, session, settings, source, painted)
        )
        return _answer(run, warnings_about(self.studio, settings, form))

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
    ) -> Answer:
        """A reference and its edits, the run.json that makes them again, and warnings."""
        sampling = (width, height, num_steps, guidance, true_cfg, negative_prompt)
        form = dict(zip(SAMPLING, sampling, strict=True))
        form |= {"prompt": prompt, "edits": as_lines("edits", edits), "seed": seed}
        own = self.studio.sessions.of(request.session_hash)
        form |= {"layers": known_layers(self.studio, own)[0] if layers is None else layers}
        form |= {"dose": dose, "weight": weight, "inject_from": inject_from, "inject_until": inject_until}
        form |= {"parts": parts, "inversion": inversion, "paste_back": paste_back, "photo": photo}
        settings = edit_settings(self.studio, form)
        _, run = self._in_turn(
            request,
            lambda session: run_edit(
                self.studio, session, settings, self._upload(photo), self._upload(mask, read_mask)
            ),
        )
        return _answer(run, warnings_about(self.studio, settings, form))

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
    ) -> tuple[dict, FileData, list[str]]:
        """The contents of vital_layers.json, vitality.png, and warnings. Asked again, it resumes."""
        sampling = (width, height, num_steps, guidance, true_cfg, "")
        form = dict(zip(SAMPLING, sampling, strict=True))
        form |= {"prompts": as_lines("prompts", prompts), "seed": seed, "top": top}
        form |= {"layers": list(range(self.studio.spec.num_layers)) if layers is None else layers}
        settings = scan_settings(self.studio, form)
        self._in_turn(request, lambda session: run_scan(self.studio, session, settings))
        folder = Path(settings.output_dir)
        found = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
        return found, _file(folder / "vitality.png"), warnings_about(self.studio, settings, form)


def as_lines(name: str, texts: Any) -> str:
    """Joins a list of texts, one per line, as a form has them. Raises InputError for anything else."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: expected a list of texts, got {texts!r:.60}")
    return "\n".join(" ".join(text.splitlines()) for text in texts)


def _answer(run: Run, warnings: list[str]) -> Answer:
    return [_file(path) for path in run.images.values()], _file(run.record), warnings


def _file(path: Path) -> FileData:
    return FileData(path=str(path), orig_name=path.name)
