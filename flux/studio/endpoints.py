"""The named HTTP endpoints; what each takes and returns stands in `flux.studio`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import FileData
from gradio.utils import get_upload_folder
from PIL import Image

from flux.studio.app import Studio
from flux.studio.edit import edit_settings_of, known_layers, run_edit
from flux.studio.generate import run_generate, settings_of
from flux.studio.limits import readable
from flux.studio.look import run_scan, scan_settings_of
from flux.studio.visits import Run, Visit

Upload = FileData | None


def add_endpoints(studio: Studio) -> None:
    """Adds /generate, /edit and /scan to the page that is being built."""

    def upload(data: Any) -> Image.Image | None:
        # A path that did not come through the upload is refused there.
        return data and studio.limits.read_upload(str(data.get("path")), Path(get_upload_folder()))

    def visit_of(request: gr.Request) -> Visit:
        visit = studio.visits.of(request.session_hash)
        visit.stop.clear()
        return visit

    def finished(work: Iterator[tuple[Any, Run]]) -> tuple[list[FileData], FileData]:
        for _, run in work:
            pass
        paths = run.pictures.values()
        pictures = [FileData(path=str(path), orig_name=path.name) for path in paths]
        return pictures, FileData(path=str(run.record), orig_name=run.record.name)

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
    ) -> tuple[list[FileData], FileData]:
        """Pictures from a prompt, and the run.json that makes them again."""
        form = dict(locals())
        with readable():
            form["image"] = upload(image)
            settings = settings_of(studio, form)
            return finished(run_generate(studio, visit_of(request), settings, form["image"]))

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
    ) -> tuple[list[FileData], FileData]:
        """A reference and its edits, and the run.json that makes them again."""
        form = dict(locals())
        with readable():
            form["photo"], form["mask"] = upload(photo), upload(mask)
            form["edits"] = "\n".join(edits)
            form["layers"] = {"on": known_layers(studio)[0] if layers is None else layers}
            settings = edit_settings_of(studio, form)
            return finished(run_edit(studio, visit_of(request), settings, form["photo"], form["mask"]))

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
    ) -> tuple[dict, FileData]:
        """What vital_layers.json says, and vitality.png. Asked for again, a scan goes on where it was."""
        form = dict(locals())
        with readable():
            every = list(range(studio.spec.num_layers))
            form |= {"prompts": "\n".join(prompts), "layers": {"on": every if layers is None else layers}}
            settings = scan_settings_of(studio, form)
            for _ in run_scan(studio, visit_of(request), settings):
                pass
            folder = Path(settings.output_dir)
            found = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
            return found, FileData(path=str(folder / "vitality.png"), orig_name="vitality.png")

    for function in (generate, edit, scan):
        gr.api(function, concurrency_id="model", concurrency_limit=1)
