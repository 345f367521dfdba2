"""The named HTTP endpoints; what each takes and returns stands in `flux.studio`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import FileData
from gradio.utils import get_upload_folder
from PIL import Image

from flux.errors import InputError
from flux.studio.forms import notices_of
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio
from flux.studio.work.edit import edit_settings_of, known_layers, run_edit
from flux.studio.work.generate import run_generate, settings_of
from flux.studio.work.scan import run_scan, scan_settings_of

Upload = FileData | None
Answer = tuple[list[FileData], FileData, list[str]]


def add_endpoints(studio: Studio) -> None:
    """Adds /generate, /edit and /scan to the page that is being built."""

    def upload(data: Any) -> Image.Image | None:
        return None if data is None else studio.limits.read_upload(data, Path(get_upload_folder()))

    def visit_of(request: gr.Request) -> Visit:
        visit = studio.visits.of(request.session_hash)
        visit.stop.clear()
        return visit

    def finished(work: Iterator[tuple[Any, Run]], notices: list[str]) -> Answer:
        for _, run in work:
            pass
        paths = run.pictures.values()
        pictures = [FileData(path=str(path), orig_name=path.name) for path in paths]
        return pictures, FileData(path=str(run.record), orig_name=run.record.name), notices

    def generate(
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
    ) -> Answer:
        """Pictures from a prompt, the run.json that makes them again, and warnings."""
        form = dict(locals())
        form["image"] = upload(image)
        settings = settings_of(studio, form)
        work = run_generate(studio, visit_of(request), settings, form["image"])
        return finished(work, notices_of(studio, settings, form))

    def edit(
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
        form = dict(locals())
        form["photo"], form["mask"] = upload(photo), upload(mask)
        form["edits"] = as_lines("edits", edits)
        form["layers"] = known_layers(studio)[0] if layers is None else layers
        settings = edit_settings_of(studio, form)
        work = run_edit(studio, visit_of(request), settings, form["photo"], form["mask"])
        return finished(work, notices_of(studio, settings, form))

    def scan(
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
        """What vital_layers.json says, vitality.png, and warnings. Asked again, it goes on where it was."""
        form = dict(locals())
        form["prompts"] = as_lines("prompts", prompts)
        form["layers"] = list(range(studio.spec.num_layers)) if layers is None else layers
        settings = scan_settings_of(studio, form)
        for _ in run_scan(studio, visit_of(request), settings):
            pass
        folder = Path(settings.output_dir)
        found = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
        plot = FileData(path=str(folder / "vitality.png"), orig_name="vitality.png")
        return found, plot, notices_of(studio, settings, form)

    for function in (generate, edit, scan):
        gr.api(function, concurrency_id="model", concurrency_limit=1)


def as_lines(name: str, texts: Any) -> str:
    """A list of texts as a page has it, one a line. Raises InputError for what is none."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: expected a list of texts, got {texts!r:.60}")
    return "\n".join(" ".join(text.splitlines()) for text in texts)
