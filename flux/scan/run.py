"""A scan: skip layers, score beside, select the vital ones and publish them."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flux.metrics.table import METRICS, load_metrics
from flux.pipeline import Pipeline
from flux.runtime.devices import pick_device
from flux.scan.plots import plot_heat_map, plot_vitality
from flux.scan.report import write_report
from flux.scan.scores import Rule, Scores, gather, score_prompt, stable, write_scores
from flux.scan.sweep import check_sweep, layer_sets, open_sweep, picture_path, sweep
from flux.settings.demos import ScanSettings
from flux.specs import encoder_of, get_spec
from flux.vital_layers import remember_scan


def scan(settings: ScanSettings, progress: bool = True, pipe: Pipeline | None = None) -> list[int]:
    """Runs the sweep and scores it beside; returns the vital layers.

    With `stop_when` "stable", the sweep ends once the references before the last one settle the vital set
    (`flux.scan.scores.stable`): the last one is still being scored while the next is made.

    Args:
        settings: complete ones (`flux.settings.complete.resolve`).
        pipe: the model; None: loaded if there is anything left to do.

    Raises:
        InputError: as `sweep`, `load_metrics` and `score_prompt`.
    """
    folder, rule = open_sweep(settings), Rule.of(settings)
    sources = {"dino": encoder_of(settings.encoder or settings.model)}
    metrics = load_metrics(settings.metrics, sources, pick_device(settings.device))
    sets = layer_sets(settings.layers, get_spec(settings.model).num_layers)
    prompts = [entry.prompt for entry in settings.entries]
    rows: list[Future] = []

    def scored(count: int) -> Scores:
        return gather(sets, [row.result() for row in rows[:count]], prompts[:count])

    with ThreadPoolExecutor(1) as scorer:

        def on_row(number: int) -> bool:
            for row in rows:
                if row.done():
                    row.result()  # raises now, not after hours, what went wrong with it
            rows.append(scorer.submit(score_prompt, folder, number, sets, metrics))
            settled = settings.stop_when == "stable" and number > 0 and stable(scored(number), rule)
            if settled:
                print(f"the vital layers are settled after {number} references")
            return settled

        try:
            sweep(settings, pipe, on_row, progress)
        except BaseException:
            scorer.shutdown(wait=False, cancel_futures=True)
            raise
        return publish(folder, folder, scored(len(rows)), rule, sources)


def publish(
    folder: Path,
    out: Path,
    scores: Scores,
    rule: Rule,
    sources: Mapping[str, str],
    told: Mapping[str, Any] | None = None,
) -> list[int]:
    """Writes what a scored sweep in `folder` says to `out`: similarity.csv, vital_layers.json, vitality.png,
    heat_map.png and report.html. Returns the vital layers.

    Args:
        told: the sweep's settings as these files tell them; None: as its run.json does.
    """
    record, sets, entries = check_sweep(folder)
    if told is not None:
        record["settings"] = dict(told)
    settings, num_double = record["settings"], get_spec(record["settings"]["model"]).params.depth
    about = {"model": settings["model"], "checkpoint": record.get("checkpoint"), "protocol": settings}
    vital = scores.vital(rule)
    change, intervals = scores.vitality(), scores.intervals() or None
    # Whatever the metric's own scale, the pictures show its change.
    table = 1 - METRICS[scores.metrics[0]].change(scores.tables[scores.metrics[0]])
    plot_vitality(change, num_double, set(vital), rule.threshold, out / "vitality.png", intervals)
    prompts = [entry.prompt for entry in entries]
    plot_heat_map(table, sets, prompts, num_double, set(vital), out / "heat_map.png")
    write_report(
        out / "report.html",
        record,
        lambda row, layers: picture_path(folder, row, layers),
        sets,
        table,
        change,
        intervals,
        vital,
        num_double,
    )
    write_scores(out, scores, rule, **about, sources=sources)
    remember_scan(out / "vital_layers.json")
    return vital
