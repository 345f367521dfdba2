"""Finds the vital layers of flux-nano's models, those that images steer among them, by scenes of their own.

    python -m training.scan_scenes --model flux-nano-kontext [--count 32]

A scan of `python -m flux.scan` has one image for all its prompts. Here every prompt has its own: Kontext a
scene and an instruction for it; Fill a scene with a mask, and its caption; Canny the edges of a scene, and
its caption; flux-nano the caption alone. Fill's images are taken as the model makes them: the scene's own
pixels are not put back. So layers count that keep a scene as it is.

Writes scene_00/ and so on as demo 2 does, similarity.csv, vital_layers.json, vitality.png and table.md.
Started again, it resumes.
"""

import random
from argparse import Namespace
from collections.abc import Collection, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from flux.conditions.images import read_conditions, sized
from flux.files import claim_folder, write_text
from flux.images.io import save_image
from flux.loaded_model import LoadedModel
from flux.metrics.table import load_metrics
from flux.runtime.devices import pick_device
from flux.scan.layers import layer_sets, scored_sets
from flux.scan.plots import plot_vitality
from flux.scan.publish import write_scores
from flux.scan.scores import Rule, Scores
from flux.scan.similarity import gather, score_row
from flux.scan.sweep import sweep
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings, SkipSettings
from flux.settings.files import check_settings
from flux.specs import encoder_of, get_spec
from flux.vital_layers import remember_scan
from flux.weights.find import checkpoint_of
from training.arguments import Parser, at_least, start
from training.benchmark import draw
from training.evaluate_conditions import FIRST, SIDE, Example, canny_examples, fill_examples, image_of
from training.scenes.instructions import instruction
from training.scenes.render import Renderer

VITAL_FROM = 0.1  # as in flux-nano's own scan
FIELDS = ("model", "device", "dtype", "num_steps", "batch_size")  # of the model's settings


def kontext_examples(renderer: Renderer, side: int) -> Iterator[Example]:
    """Draw scenes with instructions without end: edits of all of the benchmark's kinds."""
    for number in count(FIRST):
        kind, pair = draw(number)
        before, after, _ = renderer.pairs([pair], side, side, seed=number)
        said = instruction(random.Random(f"instruction {number}"), pair)
        yield Example(kind, image_of(before), image_of(after), said, {}, number)


EXAMPLES = {
    "kontext": kontext_examples,
    "fill": fill_examples,
    "control": canny_examples,
    None: canny_examples,  # for their captions
}


def steering_of(kind: str | None, example: Example, folder: Path) -> dict[str, Any]:
    """Save the images that steer one scene's sweep, and return the fields that name them."""
    files = {name: str(folder / f"{name}.png") for name in ("image", "mask")}
    save_image(example.image, files["image"])
    if kind == "fill" and example.mask:
        save_image(example.mask, files["mask"])
        return {"fill": files["image"], "mask": files["mask"], "paste_back": False}
    if kind == "kontext":
        return {"context": files["image"]}
    return {"control": files["image"]} if kind == "control" else {}


def scan_scenes(arguments: Namespace) -> Path:
    """Skip each layer for each scene, score the images, and write what was found. Return the folder.

    Raises:
        InputError: The model cannot be loaded, or as `Sweep`.
    """
    fields = {name: getattr(arguments, name) for name in FIELDS} | {"width": SIDE, "height": SIDE}
    model = check_settings(ModelSettings, fields)
    spec, folder = get_spec(model.model), arguments.folder or Path("output", f"scan_{model.model}")
    claim_folder(folder)
    pipe, device = LoadedModel.load(model), pick_device(model.device)
    sources = {"dino": encoder_of(model.model)}
    metrics = load_metrics(list(sources), sources, device)
    examples = list(islice(EXAMPLES[spec.condition](Renderer(device), SIDE), arguments.count))
    rows, sets = [], layer_sets("all", spec.num_layers)
    for number, example in enumerate(examples):
        own = folder / f"scene_{number:02d}"
        given = steering_of(spec.condition, example, own)
        given |= {"prompts": [{"prompt": example.caption, "seed": example.seed}], "output_dir": str(own)}
        settings = check_settings(SkipSettings, model.to_json() | given)
        sweep(resolve(sized(settings, read_conditions(settings))), pipe, progress=False)
        rows.append(score_row(own, 0, sets, metrics))
        print(f"{number + 1} of {len(examples)}: {example.caption}", flush=True)
    scores = gather(sets, rows, [example.caption for example in examples])
    protocol = model.to_json() | {"layers": "all", "scenes": len(examples)}
    rule, checkpoint = Rule(threshold=VITAL_FROM), checkpoint_of(model)
    vital = write_scores(
        folder, scores, rule, model=model.model, checkpoint=checkpoint, protocol=protocol, sources=sources
    )
    bars = scored_sets(scores.vitality(), spec.params.depth, vital, scores.intervals())
    plot_vitality(bars, folder / "vitality.png", VITAL_FROM)
    write_text(folder / "table.md", table(scores, vital))
    remember_scan(folder / "vital_layers.json")
    return folder


def table(scores: Scores, vital: Collection[int]) -> str:
    """Format the vitalities as Markdown, the most vital layer first."""
    vitality, ends = scores.vitality(), scores.intervals()
    lines = "| layer | vitality | 95 % interval | vital |\n| --- | --- | --- | --- |\n"
    for layers, value in sorted(vitality.items(), key=lambda pair: -pair[1]):
        interval = "{:.3f} to {:.3f}".format(*ends[layers]) if layers in ends else ""
        lines += f"| {layers[0]} | {value:.3f} | {interval} | {'yes' if layers[0] in vital else ''} |\n"
    return f"{lines}\n{scores.num_rows} scenes\n"


def main() -> None:
    """Run the command."""
    summary = (__doc__ or "").splitlines()[0]
    parser = Parser(prog="python -m training.scan_scenes", description=summary)
    parser.add_argument("--model", default="flux-nano-kontext")
    parser.add_argument("--folder", type=Path, help="if none is given, output/scan_MODEL")
    parser.add_argument("--count", type=at_least(1), default=32, help="number of scenes")
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16, help="images sampled at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    folder = scan_scenes(parser.parse_args())
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(folder / "table.md")


if __name__ == "__main__":
    start(main)
