"""Looking inside: the scan of the loaded model's layers, and how a picture comes about, step by step."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux.errors import InputError
from flux.metrics.table import load_metrics
from flux.scan.plots import plot_vitality
from flux.scan.run import publish
from flux.scan.scores import Rule, gather, score_prompt
from flux.scan.sweep import FREE_FIELDS, REFERENCE, Task, layer_sets, picture_path, plan, sweep, sweep_part
from flux.settings.demos import ScanSettings
from flux.specs import encoder_of
from flux.studio.engine import Engine, Report, Teller
from flux.studio.forms import SAMPLING, whole
from flux.studio.limits import text_in
from flux.studio.sessions import Visit, portable
from flux.studio.state import Studio
from flux.studio.widgets import layers_on

REDRAW = 2.0  # seconds between two drawings of a growing vitality.png
# ---- the scan


def scan_settings_of(studio: Studio, form: dict[str, Any]) -> ScanSettings:
    """What a filled form asks for; the folder is the same for the same wish, so that it goes on there.

    Raises InputError where it cannot be had.
    """
    prompts = [line.strip() for line in text_in(form, "prompts").splitlines() if line.strip()]
    studio.limits.check_texts(prompts, studio.limits.prompts, "prompts")
    if not prompts:
        raise InputError("Got no prompt to scan with: give at least one, each on a line of its own")
    layers = layers_on(form["layers"], studio.spec.num_layers)
    if not layers:
        raise InputError("Got no layer to scan: click at least one on")
    plain = whole({name: form.get(name) for name in (*SAMPLING, "seed", "top")})
    top = plain.pop("top")
    rule = {"gap": True} if top in (None, 0) else {"top": top}
    if type(top) is int and top > len(layers):
        raise InputError(f"top: expected at most {len(layers)}, the number of layers to scan, got {top}")
    every = len(layers) == studio.spec.num_layers
    # Their metadata would name this machine's files, and no demo takes a single bypassed picture.
    fields = {**plain, **rule, "prompts": prompts, "layers": "all" if every else layers, "metadata": False}
    settings = studio.checked(ScanSettings, fields)
    free = FREE_FIELDS | {"top", "gap"}
    wish = {name: value for name, value in settings.to_json().items() if name not in free}
    name = hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest()[:16]
    return settings.model_copy(update={"output_dir": str(studio.folder / "scans" / name)})


def make_scan(engine: Engine, settings: ScanSettings, tell: Teller) -> None:
    """Sweeps and scores as `flux.scan.run` does, with the loaded model; tells "vitality", a picture's path, as it
    grows, and at last "found", the vital layers.
    """
    folder, num_double = Path(settings.output_dir), engine.pipe.spec.params.depth
    sources = {"dino": encoder_of(settings.encoder or settings.model)}
    sets = layer_sets(settings.layers, engine.pipe.spec.num_layers)
    prompts = [entry.prompt for entry in settings.entries]
    tell.begin("bypassing layers", len(prompts) * (len(sets) + 1))
    if engine.metrics is None:
        engine.metrics = load_metrics(("dino",), sources, engine.pipe.device)
    similarity: list[dict] = [{} for _ in prompts]
    drawn = 0.0

    def scored(task: Task) -> None:
        nonlocal drawn
        for path in (picture_path(folder, task.row, layers) for layers in task.sets):
            engine.check_file(path)
        bypassed = [layers for layers in task.sets if layers != REFERENCE]
        if bypassed:
            found = score_prompt(folder, task.row, bypassed, engine.metrics)["dino"]
            similarity[task.row].update(zip(bypassed, found))
        tell.advance(len(task.sets))
        if time.perf_counter() - drawn > REDRAW and any(similarity):
            tell.made("vitality", draw())
            drawn = time.perf_counter()

    def draw() -> Path:
        known = {layers: [1 - row[layers] for row in similarity if layers in row] for layers in sets}
        means = {layers: sum(values) / len(values) for layers, values in known.items() if values}
        path = folder / "vitality.png"
        plot_vitality(means, num_double, set(), None, path)
        return path

    for task in plan(settings, engine.pipe.spec.num_layers):
        if all(picture_path(folder, task.row, layers).is_file() for layers in task.sets):
            scored(task)
    # A sweep tells of whole pictures; asked in each pass of the transformer, it stops within a step.
    hook = engine.pipe.model.final_layer.register_forward_pre_hook(tell.check)
    try:
        sweep(settings, engine.pipe, progress=False, on_task=scored)
    finally:
        hook.remove()
    rows = [{"dino": [row[layers] for layers in sets]} for row in similarity]
    # What a visitor takes home names no folder of this machine.
    told = portable(sweep_part(settings).to_json())
    vital = publish(folder, folder, gather(sets, rows, prompts), Rule.of(settings), sources, told)
    tell.made("vitality", folder / "vitality.png")
    tell.made("found", vital)


def run_scan(studio: Studio, visit: Visit, settings: ScanSettings) -> Iterator[Report]:
    """Scans, and yields each report."""
    yield from studio.engine.run(lambda tell: make_scan(studio.engine, settings, tell), visit.stop)


def read_vitality(scan: Path) -> dict[int, float]:
    """The vitality of each layer in a vital_layers.json; empty if it has none."""
    entries = json.loads(scan.read_text(encoding="utf-8")).get("vitality", {})
    return {int(name): entry["vitality"] for name, entry in entries.items() if name.isdecimal()}


# ---- the film
