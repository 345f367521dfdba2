"""The files that a scan or demo 3 writes about a scored sweep."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux.errors import warn
from flux.files import write_text
from flux.scan.findings import Findings
from flux.scan.layers import layers_text
from flux.scan.plots import plot_heat_map, plot_vitality
from flux.scan.report import write_report
from flux.scan.scores import Rule, Scores, is_settled, settled_after
from flux.scan.sweep import image_path, read_sweep
from flux.specs import get_spec
from flux.vital_layers import remember_scan


def publish(
    folder: Path,
    out: Path,
    scores: Scores,
    rule: Rule,
    sources: Mapping[str, str],
    shown_settings: Mapping[str, Any] | None = None,
    remember: bool = True,
) -> list[int]:
    """Write similarity.csv, vital_layers.json, vitality.png, heat_map.png and report.html.

    Args:
        folder: The folder of the sweep.
        out: The folder to write to.
        scores: The scores of the sweep.
        rule: The rule that chooses the vital layers.
        sources: For each metric that loads a model, its hub id or folder.
        shown_settings: The sweep's settings as these files show them. If None, those in its run.json.
        remember: Whether later edits with this checkpoint inject in these layers by default.

    Returns:
        The vital layers.

    Raises:
        InputError: The sweep is unfinished, an image cannot be read, or a file cannot be written.
    """
    record = read_sweep(folder).record
    if shown_settings is not None:
        record["settings"] = dict(shown_settings)
    settings = record["settings"]
    found = Findings.of(scores, rule, get_spec(settings["model"]).params.depth)
    measure = f"vitality (mean of {found.change_name})"
    plot_vitality(found.sets, out / "vitality.png", found.threshold, measure=measure)
    plot_heat_map(found, out / "heat_map.png")
    write_report(out / "report.html", record, found, lambda row, layers: image_path(folder, row, layers))
    write_scores(
        out,
        scores,
        rule,
        model=settings["model"],
        checkpoint=record.get("checkpoint"),
        protocol=settings,
        sources=sources,
    )
    if remember:
        remember_scan(out / "vital_layers.json")
    return found.vital


def write_scores(
    folder: Path,
    scores: Scores,
    rule: Rule,
    *,
    model: str,
    checkpoint: str | None,
    protocol: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
) -> list[int]:
    """Write similarity.csv and vital_layers.json.

    Args:
        folder: The folder to write to.
        scores: The scores of the sweep.
        rule: The rule that chooses the vital layers.
        model: The name of the model that was scanned.
        checkpoint: The fingerprint of its weights.
        protocol: The settings of the sweep.
        sources: For each metric that loads a model, its hub id or folder.

    Returns:
        The vital layers by the first metric.

    Raises:
        InputError: A file cannot be written.
    """
    layers, params = scores.vital(rule), get_spec(model).params
    if not layers:
        warn(f"No layer is vital: {_why_none(scores, rule)}")
    data = {
        "format": 2,
        "model": model,
        "num_double": params.depth,
        "num_single": params.depth_single_blocks,
        "checkpoint": checkpoint,
        "vital_layers": layers,
        "rule": {"metric": scores.metrics[0], **rule.to_json()},
        "stable": is_settled(scores, rule),
        "stable_after": settled_after(scores, rule),
        "rows": scores.num_rows,
        "vitality": _vitality(scores, rule),
        "vitality_by_other_metrics": {
            metric: {layers_text(entry): value for entry, value in scores.vitality(metric).items()}
            for metric in scores.metrics[1:]
        },
        "agreement": scores.agreement(),
        "nets": dict(sources or {}),
        "protocol": dict(protocol),
    }
    write_text(folder / "similarity.csv", scores.csv())
    write_text(folder / "vital_layers.json", _readable(data) + "\n")
    return layers


def _why_none(scores: Scores, rule: Rule) -> str:
    if not scores.layers:
        return "a rule chooses among layers that are skipped one by one, not among sets"
    highest = max(value for layers, value in scores.vitality().items() if len(layers) == 1)
    return f"the highest vitality is {highest:g}, and the threshold is {rule.threshold:g}"


def _vitality(scores: Scores, rule: Rule) -> dict[str, dict[str, float]]:
    """Return each set's vitality, its 95 % interval and, of a single layer, how often it is vital."""
    intervals, membership = scores.intervals(), scores.membership(rule)
    found = {}
    for entry, value in scores.vitality().items():
        numbers = {"vitality": value}
        if entry in intervals:
            numbers["low"], numbers["high"] = intervals[entry]
        if len(entry) == 1 and membership:
            numbers["membership"] = membership[entry[0]]
        found[layers_text(entry)] = numbers
    return found


def _readable(value: Any, indent: int = 0) -> str:
    """Format indented JSON, with each list and object of at most 90 characters on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if (indent and len(line) <= 90) or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + 2
    if isinstance(value, dict):
        ends, items = "{}", [f"{json.dumps(key)}: {_readable(item, inner)}" for key, item in value.items()]
    else:
        ends, items = "[]", [_readable(item, inner) for item in value]
    return f"{ends[0]}\n" + ",\n".join(" " * inner + item for item in items) + f"\n{' ' * indent}{ends[1]}"
