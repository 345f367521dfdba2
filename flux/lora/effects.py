"""The effect of each layer's update in a finished ablation, and the files that show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flux.errors import InputError
from flux.files import write_json, write_text
from flux.images.io import read_image
from flux.loaded_model import LoadedModel
from flux.lora.ablation import BASE, FULL, Ablation, Variant, variant_of
from flux.lora.contents import layer_name
from flux.lora.live import LiveLora
from flux.metrics.base import Metric
from flux.metrics.table import load_metrics
from flux.runtime.devices import pick_device
from flux.scan.findings import Findings
from flux.scan.layers import LayerSet, layer_ranges, layers_text
from flux.scan.plots import plot_heat_map, plot_vitality
from flux.scan.report import ReportWords, write_report
from flux.scan.scores import DECIMALS, Rule, Scores
from flux.settings.resolved import ResolvedAblate
from flux.specs import encoder_of, get_spec

AXIS = "layer without the LoRA's update"


@dataclass(frozen=True)
class Effects:
    """The scores of an ablation.

    Attributes:
        to_full: The images without a layer's update, compared with those of the whole LoRA. Their "vitality"
            is the effect of the layer's update.
        to_base: The same images, compared with those without the LoRA.
        whole: The images without the LoRA, compared with those of the whole LoRA; its one set is all layers
            that the LoRA changes.
    """

    to_full: Scores
    to_base: Scores
    whole: Scores


def ablate(
    settings: ResolvedAblate,
    loaded: tuple[LoadedModel, LiveLora] | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    progress: bool = True,
) -> Effects:
    """Make the images of an ablation, score them, and publish the result in the same folder.

    Args:
        settings: The settings of the ablation.
        loaded: The model and its LoRA. If None, they are loaded once there is something to make.
        metrics: The metrics by name. If None, those that the settings name are loaded.
        progress: Whether to show progress bars.

    Raises:
        InputError: As `Ablation`, `load_metrics` and `score`.
    """
    ablation = Ablation(settings)
    if metrics is None:
        sources = {"dino": encoder_of(settings.encoder or settings.model)}
        metrics = load_metrics(settings.metrics, sources, pick_device(settings.device))
    ablation.run(loaded, progress)
    effects = score(ablation, metrics, progress)
    publish(ablation, effects, progress)
    return effects


def score(ablation: Ablation, metrics: Mapping[str, Metric], progress: bool = True) -> Effects:
    """Compare the images of a finished ablation.

    Args:
        ablation: The ablation.
        metrics: The metrics by name. The first one decides which layers matter.
        progress: Whether to show a progress bar.

    Raises:
        InputError: An image cannot be read.
    """
    variants = list(map(variant_of, ablation.layer_sets))
    prompts = [entry.prompt for entry in ablation.settings.entries]
    found: dict[str, dict[str, list[list[float]]]] = {
        kind: {name: [] for name in metrics} for kind in ("full", "base", "whole")
    }
    for row in tqdm(range(len(prompts)), "score", unit="prompt", disable=not progress):
        for name, metric in metrics.items():
            found["full"][name].append(_similarities(ablation, row, metric, FULL, variants))
            found["base"][name].append(_similarities(ablation, row, metric, BASE, variants))
            found["whole"][name].append(_similarities(ablation, row, metric, FULL, [BASE]))
    tables = {
        kind: {name: np.round(rows, DECIMALS) for name, rows in each.items()} for kind, each in found.items()
    }
    sets, all_layers = ablation.layer_sets, [tuple(ablation.lora.layers)]
    return Effects(
        Scores(sets, tables["full"], prompts),
        Scores(sets, tables["base"], prompts),
        Scores(all_layers, tables["whole"], prompts),
    )


def _similarities(
    ablation: Ablation, row: int, metric: Metric, reference: Variant, variants: Sequence[Variant]
) -> list[float]:
    original = read_image(ablation.image_path(row, reference))
    images = [read_image(ablation.image_path(row, variant)) for variant in variants]
    for variant, image in zip(variants, images, strict=True):
        if image.size != original.size:
            raise InputError(
                f"Got {ablation.image_path(row, variant)} of another size than its reference: delete it and "
                "run the ablation again"
            )
    return metric.compare([original] * len(images), images)


def publish(ablation: Ablation, effects: Effects, progress: bool = True) -> Path:
    """Write ablation.json, two tables of similarities, effect.png, heat_map.png and report.html.

    Args:
        ablation: The ablation.
        effects: Its scores.
        progress: Whether to show a progress bar.

    Returns:
        The path of report.html.

    Raises:
        InputError: An image cannot be read, or a file cannot be written.
    """
    folder, rule = ablation.folder, Rule.of(ablation.settings)
    found = Findings.of(effects.to_full, rule, ablation.lora.params.depth)
    measure = f"effect (mean of {found.change_name})"
    plot_vitality(
        found.sets, folder / "effect.png", found.threshold, measure=measure, axis=AXIS, chosen="chosen"
    )
    plot_heat_map(found, folder / "heat_map.png", axis=f"{AXIS} (bold: chosen)")
    write_text(folder / "similarity_to_full.csv", effects.to_full.csv())
    write_text(folder / "similarity_to_base.csv", effects.to_base.csv())
    write_json(folder / "ablation.json", _as_json(ablation, effects, rule))
    words = ReportWords(
        title=f"Layers of {ablation.lora.path.name} that matter in",
        measure="effect",
        chosen="chosen",
        left_out="left out",
        reference="whole LoRA",
        base="without it",
        kept="kept of a left-out update",
    )
    write_report(
        folder / "report.html",
        ablation.record(),
        found,
        lambda row, layers: ablation.image_path(row, variant_of(layers) if layers else FULL),
        words=words,
        base_path=lambda row: ablation.image_path(row, BASE),
        progress=progress,
    )
    return folder / "report.html"


def _as_json(ablation: Ablation, effects: Effects, rule: Rule) -> dict[str, Any]:
    lora, scores = ablation.lora, effects.to_full
    [whole] = effects.whole.vitality().values()
    return {
        "format": 1,
        "model": ablation.settings.model,
        "lora": str(lora.path),
        "lora_fingerprint": lora.file.fingerprint(),
        "num_double": lora.params.depth,
        "num_single": lora.params.depth_single_blocks,
        "vital_layers": list(lora.vital_layers),
        "chosen": scores.vital(rule),
        "rule": {"metric": scores.metrics[0], **rule.to_json()},
        "rows": scores.num_rows,
        "whole": {"effect": whole, **_ends(effects.whole.intervals(), effects.whole.layer_sets[0])},
        "layers": {
            layers_text(layers): {
                "effect": effect,
                **_ends(scores.intervals(), layers),
                "to_base": effects.to_base.vitality()[layers],
            }
            for layers, effect in scores.vitality().items()
        },
        "protocol": ablation.settings.to_json(),
    }


def _ends(intervals: Mapping[LayerSet, tuple[float, float]], layers: LayerSet) -> dict[str, float]:
    return dict(zip(("low", "high"), intervals.get(layers, ())))


def effects_text(settings: ResolvedAblate, effects: Effects) -> str:
    """Write a line for each set of layers, for a console, the largest effect first."""
    scores, num_double = effects.to_full, get_spec(settings.model).params.depth
    chosen, intervals = set(scores.vital(Rule.of(settings))), scores.intervals()
    to_base = effects.to_base.vitality()
    [whole] = effects.whole.vitality().values()
    labels = {layers: layer_ranges(layers) for layers in scores.layer_sets}
    width = max(len("layer"), *map(len, labels.values()))
    lines = [f"{'layer':{width}}  name       chosen  effect  95 % interval     from the base"]
    for layers, effect in sorted(scores.vitality().items(), key=lambda item: -item[1]):
        name = layer_name(layers[0], num_double) if len(layers) == 1 else ""
        low, high = intervals.get(layers, (None, None))
        ends = f"{low:.4f} to {high:.4f}" if low is not None else ""
        star = "★" if chosen.issuperset(layers) else ""
        lines.append(
            f"{labels[layers]:>{width}}  {name:9}  {star:6}  {effect:.4f}  {ends:16}  {to_base[layers]:.4f}"
        )
    return "\n".join([*lines, "", f"the whole LoRA: {whole:.4f}"])
