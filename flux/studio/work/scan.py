"""The work of the scan tab: the vital layers of the loaded model."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from flux.conditions.images import read_conditions
from flux.files import write_text
from flux.images.io import save_image
from flux.metrics.table import load_metrics
from flux.scan.layers import layer_sets
from flux.scan.run import ScanProgress, scan
from flux.scan.sweep import sweep_settings
from flux.settings.resolved import ResolvedScan
from flux.specs import encoder_of
from flux.studio.engine import Engine
from flux.studio.progress import Progress, Update
from flux.studio.sessions import Session, portable
from flux.studio.state import Studio
from flux.studio.work.generate import images_of, steering_images


@dataclass(frozen=True)
class Vital:
    """The vital layers that a scan found."""

    layers: list[int]


def make_scan(
    engine: Engine, settings: ResolvedScan, progress: Progress[Path | Vital], remember: bool = False
) -> None:
    """Scan with the loaded model.

    Args:
        engine: The loaded model.
        settings: The scan. Its folder is resumed if it was begun before.
        progress: Receives steps, the path of vitality.png whenever it is drawn, and at last the vital layers.
        remember: Whether these layers become the default of everybody on this machine.

    Raises:
        InputError: The content filter objects to an image, or the scan cannot be done.
    """
    for image in images_of(read_conditions(settings)):
        engine.check(image)
    sets = layer_sets(settings.layers, engine.pipe.spec.num_layers)
    progress.begin("skipping layers", len(settings.entries) * (len(sets) + 1))
    if engine.metrics is None:
        sources = {"dino": encoder_of(settings.encoder or settings.model)}
        engine.metrics = load_metrics(("dino",), sources, engine.pipe.device)

    def report(scanned: ScanProgress) -> None:
        for path in scanned.new_images:
            engine.check_file(path)
        progress.advance(len(scanned.new_images))
        if scanned.plot:
            progress.emit(scanned.plot)

    # A scan reports whole images only; checked after each pass, it is cancelled within a step.
    with engine.pipe.listening(lambda _: progress.check()):
        vital = scan(
            settings,
            engine.pipe,
            progress=False,
            on_progress=report,
            metrics=engine.metrics,
            # Files that a visitor downloads name no folder of this machine.
            shown_settings=portable(sweep_settings(settings).to_json()),
            remember=remember,
        )
    progress.emit(Path(settings.output_dir) / "vitality.png")
    progress.emit(Vital(vital))


def steered_scan(settings: ResolvedScan, given: Mapping[str, Image.Image]) -> ResolvedScan:
    """Return the settings of a scan that images steer, which lie in a folder that they name together.

    Args:
        settings: The scan, see `flux.studio.forms.scan_settings`.
        given: The images by the fields that name them, of any size.
    """
    if not given:
        return settings
    images = {
        name: image if isinstance(image, list) else [image]
        for name, image in steering_images(settings, given).items()
    }
    pixels = b"".join(image.tobytes() for name in sorted(images) for image in images[name])
    name = sha256(settings.output_dir.encode() + pixels).hexdigest()[:16]
    folder, named = Path(settings.output_dir).with_name(name), dict[str, Any]()
    for field, several in images.items():
        files = [folder / f"{field}_{number}.png" for number in range(len(several))]
        for image, file in zip(several, files, strict=True):
            if not file.is_file():
                save_image(image, file)
        paths = tuple(map(str, files))
        named[field] = paths if field == "redux" else paths[0]
    return settings.model_copy(update={"output_dir": str(folder), **named})


def run_scan(studio: Studio, session: Session, settings: ResolvedScan) -> Iterator[Update[Path | Vital]]:
    """Scan, and yield each update. The layers that it finds become the session's own."""

    def work(progress: Progress[Path | Vital]) -> None:
        make_scan(studio.engine, settings, progress, studio.publish_scans)
        found = Path(settings.output_dir) / "vital_layers.json"
        write_text(session.vital_scan(settings.model), found.read_text(encoding="utf-8"))

    return studio.engine.run(work, session.stop)


def read_vitality(scan: Path) -> dict[int, float]:
    """Read the vitality of each layer from a vital_layers.json; a scan of sets of layers has none."""
    entries = json.loads(scan.read_text(encoding="utf-8")).get("vitality", {})
    return {int(name): entry["vitality"] for name, entry in entries.items() if name.isdecimal()}
