"""Which layers matter: bypass each during sampling, then score how far the picture moves (Stable Flow,
section 3.1).

`sweep` writes a folder of pictures and can be stopped and started again; `score` reads such a folder.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from flux.errors import InputError
from flux.images import grid, read_image, save_image, write_json, write_text
from flux.intervention import Intervention
from flux.perceptual import PerceptualEncoder, similarity
from flux.pipeline import Pipeline
from flux.record import about, run_record
from flux.sampling import sample
from flux.settings import DinoSettings, SkipSettings
from flux.specs import get_spec

LayerSet = tuple[int, ...]
REFERENCE: LayerSet = ()

# These may change between the starts of one sweep: they do not change its pictures.
FREE_FIELDS = {
    "output_dir",
    "batch_size",
    "device",
    "offload",
    "compile",
    "weights",
    "ae_weights",
    "text_encoders",
}


def layer_sets(layers: str | Sequence[int] | Sequence[Sequence[int]], num_layers: int) -> list[LayerSet]:
    """The sets to bypass: "all" layers one by one, those of a list one by one, or each list of a list as one
    set.
    """
    if layers == "all":
        layers = range(num_layers)
    return [(entry,) if isinstance(entry, int) else tuple(sorted(entry)) for entry in layers]


def layers_text(layers: LayerSet) -> str:
    """ "05-07" for layers 5 and 7, as in file names."""
    return "-".join(f"{layer:02d}" for layer in layers)


def picture_path(folder: Path, prompt: int, layers: LayerSet) -> Path:
    """Where a sweep keeps the picture of its prompt number `prompt` with `layers` bypassed."""
    name = f"skip_{layers_text(layers)}.png" if layers else "reference.png"
    return folder / f"prompt_{prompt:03d}" / name


def open_sweep(settings: SkipSettings) -> Path:
    """The folder of a sweep, its settings left in it as run.json if it is new.

    Raises:
        InputError: the folder holds a sweep made with other settings.
    """
    folder = Path(settings.output_dir)
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", run_record(settings))
        return folder
    own, there = settings.to_json(), read_sweep(folder)["settings"]
    names = (own.keys() | there.keys()) - FREE_FIELDS
    differ = sorted(name for name in names if own.get(name) != there.get(name))
    if differ:
        raise InputError(
            f"Got {folder}, which holds a sweep made with another {', '.join(differ)}: "
            "give another output_dir, or delete it"
        )
    return folder


def sweep(pipe: Pipeline, settings: SkipSettings, progress: bool = True) -> Path:
    """Writes, for each prompt, the reference and a picture for each set of layers bypassed. Returns the
    folder.

    Pictures that are there already are kept, so that a sweep that was stopped goes on where it was. Each row
    of a batch has its own set bypassed.

    Args:
        settings: complete ones (`flux.specs.complete`).

    Raises:
        InputError: as `open_sweep`.
    """
    folder = open_sweep(settings)
    sets = [REFERENCE, *layer_sets(settings.layers, pipe.spec.num_layers)]
    numbered = list(enumerate(settings.prompts))
    missing = [
        [layers for layers in sets if not picture_path(folder, number, layers).exists()]
        for number, _ in numbered
    ]
    total = len(sets) * len(numbered)
    with tqdm(
        total=total, initial=total - sum(map(len, missing)), desc="bypass", unit="image", disable=not progress
    ) as bar:
        for (number, entry), todo in zip(numbered, missing):
            for start in range(0, len(todo), settings.batch_size):
                batch = todo[start : start + settings.batch_size]
                for layers, picture in zip(batch, bypass(pipe, entry.prompt, entry.seed, batch, settings)):
                    more = about(settings, entry.prompt, entry.seed, bypassed=layers)
                    save_image(picture, picture_path(folder, number, layers), more)
                    bar.update()
    save_image(_overview(folder, settings, sets), folder / "grid.png")
    write_json(folder / "run.json", run_record(settings, timings=pipe.timings))
    return folder


def read_sweep(folder: Path) -> dict:
    """The run.json of a sweep's folder. Raises InputError if it has none."""
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(
            f"Got {folder}, which holds no run.json of demo_2_skip.py: give the folder that it wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["demo"] != SkipSettings.demo:
            raise InputError(
                f"Got {folder}, which demo {record['demo']!r} wrote: give a folder of demo_2_skip.py"
            )
        record["settings"]["prompts"], record["settings"]["layers"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Got {path}, which cannot be read as a sweep's: {error}") from error
    return record


def bypass(
    pipe: Pipeline, prompt: str, seed: int, sets: Sequence[LayerSet], settings: SkipSettings
) -> list[Image.Image]:
    """The same picture once for each set of layers bypassed at every step, as one batch; the empty set: in
    full.
    """
    width, height = settings.width, settings.height
    batch = len(sets)
    cond = pipe.condition([prompt] * batch, settings.guidance, settings.true_cfg, settings.negative_prompt)
    latent = pipe.noise([seed], width, height).expand(batch, -1, -1)
    levels = pipe.schedule(settings.num_steps, width, height)
    intervention = Intervention(skip=tuple(frozenset(layers) for layers in sets))
    with pipe.denoising() as model:
        for step in sample(model, latent, pipe.image_ids(batch, width, height), cond, levels, intervention):
            latent = step.latent
    return pipe.decode(latent, width, height, settings.watermark)


def _overview(folder: Path, settings: SkipSettings, sets: list[LayerSet]) -> Image.Image:
    """One row of pictures for each prompt."""
    titles = [f"without {layers_text(layers)}" if layers else "reference" for layers in sets]
    numbers = range(len(settings.prompts))
    pictures = [[read_image(picture_path(folder, number, layers)) for layers in sets] for number in numbers]
    return grid(pictures, [titles] * len(pictures), [entry.prompt for entry in settings.prompts])


@dataclass(frozen=True)
class Scores:
    """Similarity of each bypassed picture to its reference.

    Attributes:
        sets: the sets of layers that were bypassed.
        table: cosine similarity of DINOv2's CLS features, by prompt and set, "prompts sets".
    """

    sets: list[LayerSet]
    table: torch.Tensor

    @property
    def vitality(self) -> dict[LayerSet, float]:
        """1 minus the mean similarity over the prompts (Stable Flow, equation 1), by set."""
        return dict(zip(self.sets, (1 - self.table.double().mean(dim=0)).tolist()))

    def vital(self, top: int | None = None, threshold: float | None = None) -> list[int]:
        """The single layers of highest vitality: the first `top`, or all that reach `threshold` (equation 2);
        sorted.
        """
        ranked = sorted(
            ((value, layers[0]) for layers, value in self.vitality.items() if len(layers) == 1), reverse=True
        )
        chosen = ranked[:top] if threshold is None else [entry for entry in ranked if entry[0] >= threshold]
        return sorted(layer for _, layer in chosen)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["prompt", "layers", "similarity"])
        for number, row in enumerate(self.table.tolist()):
            writer.writerows(
                [number, layers_text(layers), f"{value:.6f}"] for layers, value in zip(self.sets, row)
            )
        return text.getvalue()


def check_sweep(folder: Path) -> tuple[dict, list[LayerSet]]:
    """A finished sweep's run.json and its sets of layers.

    Raises:
        InputError: no sweep, or one that lacks pictures.
    """
    record = read_sweep(folder)
    sets = layer_sets(record["settings"]["layers"], get_spec(record["settings"]["model"]).num_layers)
    numbers = range(len(record["settings"]["prompts"]))
    paths = [picture_path(folder, number, layers) for number in numbers for layers in (REFERENCE, *sets)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"Got {folder}, which lacks {len(missing)} of its {len(paths)} pictures "
            f"(the first: {missing[0].relative_to(folder)}): let demo_2_skip.py finish it"
        )
    return record, sets


def score(folder: Path, encoder: PerceptualEncoder, progress: bool = True) -> Scores:
    """The similarities of a finished sweep. Raises InputError as `check_sweep`, and for pictures of unequal
    size.
    """
    record, sets = check_sweep(folder)
    rows = []
    for number in tqdm(
        range(len(record["settings"]["prompts"])), desc="score", unit="prompt", disable=not progress
    ):
        pictures = [read_image(picture_path(folder, number, layers)) for layers in (REFERENCE, *sets)]
        if len({picture.size for picture in pictures}) > 1:
            raise InputError(f"Got pictures of unequal size in {folder / f'prompt_{number:03d}'}")
        features = encoder.embed(pictures)
        rows.append(similarity(features[:1].expand_as(features[1:]), features[1:]).cpu())
    return Scores(sets, torch.stack(rows))


def write_scores(folder: Path, scores: Scores, record: dict, settings: DinoSettings) -> list[int]:
    """Writes similarity.csv and vital_layers.json; returns the vital layers by the settings' rule."""
    layers = scores.vital(settings.top, settings.threshold)
    write_text(folder / "similarity.csv", scores.csv())
    about_scan = {
        "vital_layers": layers,
        "rule": {"top": settings.top} if settings.threshold is None else {"threshold": settings.threshold},
        "vitality": {layers_text(layers): round(value, 6) for layers, value in scores.vitality.items()},
        "encoder": settings.model,
        "sweep": record["settings"],
    }
    write_json(folder / "vital_layers.json", {"model": record["settings"]["model"], **about_scan})
    return layers
