"""The work of the LoRA tab: a visitor's LoRA, looked into and put beside the model for one run.

The model is everybody's. A LoRA is put on once the run has the model for itself, and taken off when the run
ends, also when it is cancelled or fails.
"""

import os
import re
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from flux.conditions.images import read_conditions
from flux.errors import InputError
from flux.images.given import Images
from flux.lora.live import LiveLora
from flux.lora.report import LoraReport, look_into
from flux.model import Flux
from flux.settings.demos import GenerateSettings, Lora
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.engine import Engine
from flux.studio.limits import uploaded_file
from flux.studio.progress import MadeImage, Progress, Update
from flux.studio.sessions import Run, Session, portable
from flux.studio.state import Studio
from flux.studio.work.generate import make_images, run_generate
from flux.weights.checkpoint import open_checkpoint
from flux.weights.load import on_meta
from flux.weights.lora import read_lora
from flux.weights.lora_formats import LowRank
from flux.weights.lora_patches import Patch
from flux.weights.lora_places import match_patches

HEADER_BYTES = 16 * 2**20
"""Longest header of an uploaded LoRA: as text in memory it takes many times its bytes."""
COPIED_BYTES = 2**30
"""Most bytes of weights that a LoRA may have a changed copy of beside the model's own."""
NAME = "000"
"""The name of the one image of a run."""
_READING = threading.Lock()  # one upload at a time is looked into


# ---- files


@dataclass(frozen=True)
class HeldLora:
    """A session's LoRA.

    Attributes:
        path: The file, in the session's folder.
        report: What it changes.
    """

    path: Path
    report: LoraReport


def keep_lora(studio: Studio, session: Session, upload: Any, inside: Path) -> HeldLora:
    """Check an uploaded LoRA and keep it for the session, in place of an earlier one.

    Args:
        studio: The studio.
        session: The visitor's session.
        upload: What a browser or a program sent: `{"path": ...}` if it is valid.
        inside: The folder that uploads are written to.

    Raises:
        InputError: The upload is no LoRA for the loaded model, it is too large, or no LoRA can be put beside
            the model.
    """
    check_engine(studio.engine)
    path = uploaded_file(upload, inside)
    if path is None:
        raise InputError("Got a LoRA that was not uploaded, or that was deleted: upload it first")
    if (size := path.stat().st_size) > studio.limits.lora_bytes:
        most = studio.limits.lora_bytes // 2**20
        raise InputError(f"Got a LoRA of {size // 2**20} MB, expected at most {most}")
    _check_header(path)
    return hold_lora(studio, session, path)


def hold_lora(studio: Studio, session: Session, path: Path) -> HeldLora:
    """Keep a LoRA file for the session, in place of an earlier one for this model.

    Raises:
        InputError: It is no LoRA for the loaded model.
    """
    folder = session.folder / "uploads" / "lora" / studio.defaults.model
    kept = folder / uuid4().hex / f"{_plain_name(path)}.safetensors"
    kept.parent.mkdir(parents=True)
    try:
        os.link(path, kept)
    except OSError:  # some file systems have no links
        shutil.copyfile(path, kept)
    try:
        with _READING:
            [report] = look_into([kept])
        _check_fit(studio, report)
    except InputError as error:
        shutil.rmtree(kept.parent)
        # The visitor knows the file by its name, and should not learn the server's folders.
        raise InputError(str(error).replace(str(kept), kept.name)) from None
    for earlier in folder.iterdir():
        if earlier != kept.parent:
            shutil.rmtree(earlier, ignore_errors=True)
    return HeldLora(kept, report)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8 or struct.unpack("<Q", start)[0] > HEADER_BYTES:
        raise InputError(f"Got {path.name}, which is no LoRA in a .safetensors file")


def _plain_name(path: Path) -> str:
    """Return a file's name without what a file system or a command line may read otherwise."""
    return re.sub(r"[^\w-]+", "_", path.stem, flags=re.ASCII).strip("_")[:80] or "lora"


def _check_fit(studio: Studio, report: LoraReport) -> None:
    if studio.defaults.model not in report.lora.models:
        made_for = report.lora.models[0]
        choose = f", choose {made_for} above" * (made_for in studio.models)
        raise InputError(
            f"Got {report.lora.path.name}, a LoRA for {made_for}: this page is of "
            f"{studio.defaults.model}{choose}"
        )
    copied = sum(
        patch.place.rows * (patch.place.columns or 1)
        for patch in report.lora.patches
        if not _is_beside(patch)
    )
    # The weights as they were, those that the strength leads from, and those that it leads to.
    needed = 3 * copied * studio.engine.dtype.itemsize
    if needed > COPIED_BYTES:
        raise InputError(
            f"Got {report.lora.path.name}, a {report.lora.form}, which needs {needed / 2**30:.1f} GB of "
            "copies beside the model: its operator can start the studio with it (--lora)"
        )


# ---- the LoRA of a run


def check_engine(engine: Engine) -> None:
    """Raise InputError unless LoRAs can be put beside the loaded model: plain weights that stay in place."""
    settings = engine.settings
    for hindrance, is_there in (
        ("offloaded", engine.is_offloaded),
        ("quantised", settings.quantize != "none"),
        ("compiled", settings.compile),
    ):
        if is_there:
            raise InputError(
                f"Got a LoRA, but this studio's model is {hindrance}, so none can be put beside it: its "
                "operator can start it with one (--lora)"
            )


@contextmanager
def lora_on(engine: Engine, lora: Lora) -> Iterator[None]:
    """Put a LoRA beside the engine's transformer for the duration of the block.

    Args:
        engine: The engine. No other run may use it meanwhile.
        lora: The LoRA, its strength, and factors of it by layer.

    Raises:
        InputError: The file is gone, or does not fit.
    """
    model, path = engine.pipe.model, Path(lora.file)
    if not path.is_file():
        raise InputError("Your LoRA is gone, a day after the session's last use: upload it again")
    check_engine(engine)  # its model may not have been loaded before
    file = read_lora(open_checkpoint(path), lora.weight, lora.layers)
    patches = match_patches([file], "transformer", on_meta(Flux, model.params))
    with _as_it_was(model, patches):
        LiveLora(model, patches, model.params.depth, engine.pipe.dtype)
        yield


@contextmanager
def _as_it_was(model: Flux, patches: list[Patch]) -> Iterator[None]:
    """Give a transformer its own modules back, those that these changes replace, when the block ends."""
    own = {name: model.get_submodule(name) for name in {patch.place.module for patch in patches}}
    # Changes that are no matrices of low rank are written into weights, which other models may use too.
    for name in {patch.place.module for patch in patches if not _is_beside(patch)}:
        model.set_submodule(name, deepcopy(own[name]))
    try:
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def _is_beside(patch: Patch) -> bool:
    """Tell whether a change leaves the weights as they are, and stands beside them."""
    return patch.change is None or isinstance(patch.change, LowRank)


def run_lora(
    studio: Studio,
    session: Session,
    settings: ResolvedGenerate,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[tuple[Update[MadeImage], Run | None, Run]]:
    """Make one image without the visitor's LoRA and one with it.

    Args:
        studio: The studio.
        session: The visitor's session. An image without it that was made before is not made again.
        settings: One prompt; the last LoRA is the visitor's.
        steering: Images that steer the run, by the fields that name them.

    Yields:
        Each update, the run without the LoRA once it is done, and the run that the update is of.
    """
    plain = settings.model_copy(update={"lora": settings.lora[:-1]})
    conditions = read_conditions(settings, steering)
    before = None if steering else _earlier_run(session, plain)  # it may have begun with another image
    if before is None:
        for update, run in run_generate(studio, session, plain, steering=steering):
            yield update, None, run
            before = run
    if session.stop.is_set():
        return

    def work(progress: Progress[MadeImage], _: Run) -> None:
        with lora_on(studio.engine, settings.lora[-1]):
            make_images(studio.engine, settings, progress, conditions=conditions)

    for update, run in studio.run(session, settings, work, steering):
        yield update, before, run


def _earlier_run(session: Session, settings: ResolvedGenerate) -> Run | None:
    """Find the session's last finished run with these settings."""
    wanted = check_settings(GenerateSettings, portable(settings.to_json()))
    for run in reversed(session.runs):
        if run.settings == wanted and NAME in run.images and run.images[NAME].is_file():
            return run
    return None
