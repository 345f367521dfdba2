"""The work of the scan tab: the vital layers of the loaded model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flux.files import write_text
from flux.metrics.table import load_metrics
from flux.scan.layers import layer_sets
from flux.scan.run import ScanProgress, scan
from flux.scan.sweep import sweep_settings
from flux.settings.resolved import ResolvedScan
from flux.specs import encoder_of
from flux.studio.engine import Engine, Progress, Update
from flux.studio.sessions import Session, portable
from flux.studio.state import Studio


@dataclass(frozen=True)
class Vital:
    """The vital layers that a scan found."""

    layers: list[int]


def make_scan(
    engine: Engine, settings: ResolvedScan, progress: Progress[Path | Vital], remember: bool = False
) -> None:
    """Scans with the loaded model.

    Args:
        engine: The loaded model.
        settings: The scan. Its folder is resumed if it was begun before.
        progress: Receives steps, the path of vitality.png whenever it is drawn, and at last the vital layers.
        remember: Whether these layers become the default of everybody on this machine.

    Raises:
        InputError: The content filter objects to an image, or the scan cannot be done.
    """
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


def run_scan(studio: Studio, session: Session, settings: ResolvedScan) -> Iterator[Update[Path | Vital]]:
    """Scans, and yields each update. The layers that it finds become the session's own."""

    def work(progress: Progress[Path | Vital]) -> None:
        make_scan(studio.engine, settings, progress, studio.publish_scans)
        found = Path(settings.output_dir) / session.vital_scan.name
        write_text(session.vital_scan, found.read_text(encoding="utf-8"))

    return studio.engine.run(work, session.stop)


def read_vitality(scan: Path) -> dict[int, float]:
    """Reads the vitality of each layer from a vital_layers.json; a scan of sets of layers has none."""
    entries = json.loads(scan.read_text(encoding="utf-8")).get("vitality", {})
    return {int(name): entry["vitality"] for name, entry in entries.items() if name.isdecimal()}
