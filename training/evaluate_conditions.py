"""Measures what flux-nano makes of masked scenes and of edges, on scenes that training never draws.

    python -m training.evaluate_conditions fill [--count 120]
    python -m training.evaluate_conditions canny

Writes table.md and sheet.png. Beside the adapter's images stand those of flux-nano without it, from the same
captions and noise, and the rendered scenes: the most that the judge lets anything reach.

Fill paints what an edit of the benchmark's kinds may change, grown to a box, with the caption after the edit;
or all but the middle of a scene ("outpaint"). Canny paints a scene anew from its caption and its edges.
"""

import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux.conditions.control import control_condition
from flux.conditions.fill import fill_condition, paste_unmasked
from flux.conditions.images import Steering
from flux.files import claim_folder, write_text
from flux.images.io import save_image, to_pil, to_tensor
from flux.images.sheets import grid
from flux.inputs import Condition
from flux.loaded_model import LoadedModel
from flux.metrics.pixels import MAX_PSNR, decibels
from flux.modules.image_embedders import CannyImageEncoder
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from training.arguments import Parser, at_least, start
from training.benchmark import draw
from training.judge import MeasuringJudge, asked_for
from training.scenes.compose import sample
from training.scenes.content import Content
from training.scenes.render import Renderer

SIDE = 256
FIRST = 10_000  # the number of the first edit: those of the benchmark are lower
MARGIN = 8  # pixels between what an edit changes and the edge of the mask's box
NEAR = 2  # pixels by which an edge may be off
OUTPAINTED = 5  # every so many masked scenes, all but the middle is masked
JUDGED = 40  # images judged at once
SHEET_ROWS = 10
FIELDS = ("device", "dtype", "num_steps", "guidance", "batch_size")  # of the model's settings
DIGITS = {"PSNR inside": 1, "changed outside": 4}  # behind the point, in the table; of all others 2

Scores = dict[str, float]


@dataclass(frozen=True, eq=False)
class Example:
    """A scene to fill, or to paint anew from its edges.

    Attributes:
        kind: The kind of edit, or of scene.
        image: The scene that the condition is made of.
        truth: The scene that the caption describes.
        caption: The prompt.
        asked: What the judge checks.
        seed: The seed of the noise.
        mask: White where the scene is filled. None for edges.
    """

    kind: str
    image: Image.Image
    truth: Image.Image
    caption: str
    asked: dict[str, Any]
    seed: int
    mask: Image.Image | None = None


# ---- the scenes


def fill_examples(renderer: Renderer, side: int) -> Iterator[Example]:
    """Draw masked scenes without end: edits of a part of a scene, and scenes cut down to their middle."""
    for number in count(FIRST):
        if number % OUTPAINTED == 0:
            yield _outpainted(renderer, number, side)
            continue
        kind, pair = draw(number)
        if not pair.changed:
            continue
        before, after, changed = renderer.pairs([pair], side, side, seed=number)
        yield Example(
            kind,
            image_of(before),
            image_of(after),
            pair.after.caption,
            asked_for(pair.edit, pair.before.content, pair.after.content),
            number,
            boxed(changed[0, 0]),
        )


def _outpainted(renderer: Renderer, number: int, side: int) -> Example:
    scene = sample(random.Random(f"outpaint {number}"))
    image = image_of(renderer(torch.tensor([scene.row()]), side, side, seed=number))
    mask = Image.new("L", (side, side), 255)
    mask.paste(0, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    asked = asked_of(scene.content)
    return Example("outpaint", image, image, scene.caption, asked, number, mask)


def canny_examples(renderer: Renderer, side: int) -> Iterator[Example]:
    """Draw scenes without end."""
    for number in count(FIRST):
        scene = sample(random.Random(f"canny scene {number}"))
        image = image_of(renderer(torch.tensor([scene.row()]), side, side, seed=number))
        yield Example(scene.content.kind, image, image, scene.caption, asked_of(scene.content), number)


def asked_of(content: Content) -> dict[str, Any]:
    """Say what a caption asks for: its objects, place and time, and the first one's hat and colour."""
    subject = content.subjects[0]
    asked: dict[str, Any] = {"objects": [each.name for each in content.subjects], "gone": []}
    asked |= {"place": content.place, "time": content.time}
    if subject.hat:
        asked["worn"] = subject.hat
    if subject.colour and len(content.subjects) == 1:
        asked["colour"] = subject.colour
    return asked


def boxed(changed: Tensor) -> Image.Image:
    """Return the mask of the box around booleans "H W". Its outline says nothing of what is in it."""
    height, width = changed.shape
    rows, columns = (changed.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    box = columns[0] - MARGIN, rows[0] - MARGIN, columns[-1] + 1 + MARGIN, rows[-1] + 1 + MARGIN
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])))
    return mask


def image_of(rendered: Tensor) -> Image.Image:
    """Return a rendered scene, "1 3 H W" in 0..1, as an image."""
    return to_pil(2 * rendered[0] - 1)


# ---- the images


def make(
    pipe: LoadedModel,
    settings: ModelSettings,
    examples: Sequence[Example],
    condition_of: Callable[[LoadedModel, Example], Condition] | None = None,
) -> list[Image.Image]:
    """Generate an image for each example, with its condition if there is a function that makes one."""
    images = []
    sampling = resolve(settings).sampling()
    for begin in range(0, len(examples), settings.batch_size):
        part = examples[begin : begin + settings.batch_size]
        steered = pipe
        if condition_of:
            rows = reduce(Condition.stacked, [condition_of(pipe, each) for each in part])
            steered = replace(pipe, steering=Steering(rows))
        captions, seeds = [each.caption for each in part], [each.seed for each in part]
        images += steered.generate(captions, seeds, progress=False, **sampling)
    return images


def masked(pipe: LoadedModel, example: Example) -> Condition:
    """Make the condition of Fill."""
    if example.mask is None:
        raise ValueError("The example has no mask")
    return fill_condition(pipe.encode_pixels, example.image, example.mask)


def edges(pipe: LoadedModel, example: Example) -> Condition:
    """Make the condition of Canny."""
    return control_condition(
        pipe.encode_pixels, example.image, *example.image.size, CannyImageEncoder(pipe.device)
    )


# ---- the measures


def measure(
    judge: MeasuringJudge, examples: Sequence[Example], images: Sequence[Image.Image]
) -> list[Scores]:
    """Measure images.

    Returns:
        For each, by the titles of the table: whether the judge finds what the caption says; how much of the
        subjects is where it is in the scene, as intersection over union; then for a mask the PSNR inside and
        the share of changed pixels outside, for edges their agreement.
    """
    rows = []
    for begin in range(0, len(examples), JUDGED):
        part, made = examples[begin : begin + JUDGED], images[begin : begin + JUDGED]
        truths, asked = [each.truth for each in part], [each.asked for each in part]
        for example, image, verdict in zip(part, made, judge.judge(truths, made, asked), strict=True):
            scores = {"success": float(verdict.success), "overlap": verdict.overlap}
            own = fidelity(example, image) if example.mask else agreement(example, image)
            rows.append(scores | own)
    return rows


def fidelity(example: Example, image: Image.Image) -> Scores:
    """Compare a filled image with the scene: in dB inside the mask, and pixel by pixel outside of it."""
    made, truth, image_before = (
        np.asarray(each, np.float64) for each in (image, example.truth, example.image)
    )
    inside = np.asarray(example.mask) > 0
    error = float(np.square((made - truth)[inside] / 255).mean())
    outside = (made != image_before).any(axis=2)[~inside]
    return {"PSNR inside": min(MAX_PSNR, decibels(error)), "changed outside": float(outside.mean())}


def agreement(example: Example, image: Image.Image) -> Scores:
    """Compare an image's edges with the scene's: F1, where an edge may be NEAR pixels off."""
    found, wanted = (_edges(each) for each in (image, example.image))
    near_found, near_wanted = (
        F.max_pool2d(each.float(), 2 * NEAR + 1, stride=1, padding=NEAR) > 0 for each in (found, wanted)
    )
    precision = (found & near_wanted).sum() / found.sum().clamp(min=1)
    recall = (wanted & near_found).sum() / wanted.sum().clamp(min=1)
    return {"edges F1": float(2 * precision * recall / (precision + recall).clamp(min=1e-9))}


def _edges(image: Image.Image) -> Tensor:
    """Find an image's edges: booleans "1 H W"."""
    return CannyImageEncoder("cpu")(to_tensor(image)[None])[:, 0] > 0


def table(made: Mapping[str, Sequence[Scores]], examples: Sequence[Example]) -> str:
    """Format the means of all measures, and those of success by kind, as Markdown."""
    titles = list(next(iter(made.values()))[0])
    kinds = {
        kind: [each.kind == kind for each in examples] for kind in dict.fromkeys(e.kind for e in examples)
    }
    lines = [["", *titles, *kinds], ["---"] * (1 + len(titles) + len(kinds))]
    for name, rows in made.items():
        cells = [f"{np.mean([row[title] for row in rows]):.{DIGITS.get(title, 2)}f}" for title in titles]
        success = np.array([row["success"] for row in rows])
        cells += [f"{success[chosen].mean():.2f}" for chosen in kinds.values()]
        lines.append([name, *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{len(examples)} scenes. The columns behind the measures: success by kind.\n"


def sheet(examples: Sequence[Example], made: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Draw some examples, a row each: what is given, the scene, then the images."""
    shown = range(0, len(examples), max(1, len(examples) // SHEET_ROWS))
    images = [[_given(examples[n]), *(each[n] for each in made.values())] for n in shown]
    titles = [["given", *made]] * len(shown)
    return grid(images, titles, [f"{examples[n].kind}: {examples[n].caption}" for n in shown])


def _given(example: Example) -> Image.Image:
    """Show what is given: the scene without what is masked, or its edges."""
    if example.mask:
        return Image.composite(Image.new("RGB", example.image.size, "white"), example.image, example.mask)
    return Image.fromarray(np.where(_edges(example.image)[0], 255, 0).astype(np.uint8)).convert("RGB")


# ---- the command


def evaluate(kind: str, arguments: Namespace) -> Path:
    """Make, measure and show the images of one kind. Return the path of the table.

    Raises:
        InputError: A model cannot be loaded, or a file cannot be written.
    """
    given = {name: getattr(arguments, name) for name in FIELDS}
    given |= {"model": arguments.model or f"flux-nano-{kind}", "width": SIDE, "height": SIDE}
    settings = check_settings(ModelSettings, given)
    scaled = [check_settings(ModelSettings, given | {"true_cfg": scale}) for scale in arguments.true_cfg]
    pipe = LoadedModel.load(settings)
    nano = settings.model_copy(update={"model": "flux-nano", "guidance": None})
    plain = LoadedModel.load(nano)
    renderer, judge = Renderer(pipe.device), MeasuringJudge.load(device=pipe.device)
    draws = {"fill": fill_examples, "canny": canny_examples}[kind](renderer, SIDE)
    examples = list(islice(draws, arguments.count))
    condition_of = {"fill": masked, "canny": edges}[kind]
    made = {"the scene": [each.truth for each in examples]}
    made["flux-nano"] = make(plain, nano, examples)
    for scale, own in zip(arguments.true_cfg, scaled):
        name = settings.model + (f", true CFG {scale:g}" if scale > 1 else "")
        made[name] = make(pipe, own, examples, condition_of)
    for name, images in list(made.items())[1:]:
        made[name] = [
            paste_unmasked(image, each.image, each.mask) if each.mask else image
            for image, each in zip(images, examples)
        ]
    rows = {name: measure(judge, examples, images) for name, images in made.items()}
    folder = arguments.folder / kind
    write_text(folder / "table.md", table(rows, examples))
    save_image(sheet(examples, made), folder / "sheet.png")
    return folder / "table.md"


def main() -> None:
    """Run the command."""
    parser = Parser(
        prog="python -m training.evaluate_conditions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("kind", choices=("fill", "canny"), nargs="+", help="what is measured")
    parser.add_argument("--folder", type=Path, default=Path("output/evaluate_conditions"))
    parser.add_argument("--count", type=at_least(1), default=120, help="number of scenes")
    parser.add_argument("--model", help="the model; if none is given, flux-nano-fill or flux-nano-canny")
    parser.add_argument("--num_steps", type=int, help="number of steps; if none is given, the model's")
    parser.add_argument("--guidance", type=float, help="distilled guidance, likewise")
    parser.add_argument("--true_cfg", type=float, nargs="+", default=[1.0], help="scales, a row for each")
    parser.add_argument("--batch_size", type=int, default=40, help="images sampled at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    claim_folder(arguments.folder)
    for kind in arguments.kind:
        path = evaluate(kind, arguments)
        print(path.read_text(encoding="utf-8"))
        print(path)


if __name__ == "__main__":
    start(main)
