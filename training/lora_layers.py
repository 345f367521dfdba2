"""Asks which layers a LoRA should be trained in: the same trainings with the same number of trained numbers.

    python -m training.lora_layers training/lora_layers.json [any other field of the file]

Each subject and style of `training.subjects` is trained on flux-nano, in each choice of layers and with each
seed. Writes results.csv, results.md and all trainings to the output_dir. Started again, it resumes.
"""

import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from flux.errors import InputError, exit_on_input_error
from flux.files import claim_folder, write_json, write_text
from flux.images.io import read_image
from flux.settings.command_line import run
from flux.settings.demos import Settings
from flux.settings.fields import LIST, FilePath, LayerNumbers, Seed, Steps, Text, Words
from flux.settings.files import check_settings, read_settings
from flux.settings.train import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from flux.metrics.features import PerceptualEncoder

Choice = Literal["all"] | LayerNumbers
ASKED = (
    ("beach", "night", "on the beach at night"),
    ("snow", "day", "in the snow"),
    ("table", "day", "on a wooden table"),
)
"""Place, time and words of the prompts with the trigger. Few training images show any of these."""
DRAWINGS = 6  # of what a prompt asks for, which samples are compared with
OTHERS = ("a dog on the grass", "a red car on the street", "two apples on a wooden table")
"""Prompts without the trigger, whose images should stay."""
TRAINING, TIME = "training", "time.json"


class LayersSettings(Settings, frozen=True):
    """The fields of such a comparison."""

    demo: ClassVar[str] = "lora_layers"
    program: ClassVar[str] = "python -m training.lora_layers"
    names: Words = Field(description="subjects and styles of training.subjects")
    choices: dict[Text, Choice] = Field(description='layers to compare, by a name: "all" or a list')
    budget: int = Field(default=327_680, ge=1, description="numbers that each choice may train, at most")
    seeds: Annotated[tuple[Seed, ...], LIST] = Field(
        default=(0, 1, 2), description="seeds of the trainings, and of the images that they train on"
    )
    images: int = Field(default=10, ge=1, description="training images")
    steps: Steps = Field(default=300, description="training steps")
    learning_rate: float = Field(default=2e-3, gt=0, description="learning rate")
    num_steps: Steps = Field(default=20, description="denoising steps of the samples")
    side: int = Field(default=256, ge=64, description="width and height of all images in pixels")
    device: Text = Field(default="auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')
    output_dir: FilePath = Field(default="output/lora_layers", description="folder to write to, or to resume")


@dataclass(frozen=True)
class Outcome:
    """One training's outcome. Similarities are cosines of DINOv2's features, means over prompts.

    Attributes:
        name: The subject or style.
        choice: The name of the layers.
        seed: The seed.
        likeness: How similar samples are to drawings of what their prompts ask for.
        base: The same for the base model's samples.
        leaked: The distance of samples without the trigger to the base model's.
        trained: Trained numbers.
        kilobytes: Size of the LoRA.
        seconds: CPU seconds a step, the median.
    """

    name: str
    choice: str
    seed: int
    likeness: float
    base: float
    leaked: float
    trained: int
    kilobytes: float
    seconds: float


MEASURES = ("likeness", "base", "leaked", "trained", "kilobytes", "seconds")


def costs_of(layers: Sequence[int]) -> dict[int, int]:
    """Return how many numbers rank 1 trains in each of flux-nano's layers."""
    from flux.intervention import check_layers
    from flux.lora.adapters import find_targets
    from flux.specs import configs

    spec = configs["flux-nano"]
    check_layers(layers, spec.num_layers)
    targets = find_targets(spec.params, layers, ("attention", "mlp"), 1, None)
    return {layer: sum(t.parameters for t in targets if t.layer == layer) for layer in layers}


def ranks_for(layers: Sequence[int], budget: int) -> dict[int, int]:
    """Return the rank of each layer that trains nearly `budget` numbers, and not more.

    The ranks of two layers differ by 1 at most.

    Raises:
        InputError: The budget is too small for rank 1 in every layer.
    """
    costs = costs_of(layers)
    rank, left = divmod(budget, sum(costs.values()))
    if not rank:
        raise InputError(f"Got budget {budget}, expected at least {sum(costs.values())} for layers {layers}")
    ranks = dict.fromkeys(layers, rank)
    for layer, cost in costs.items():
        if cost <= left:
            ranks[layer], left = rank + 1, left - cost
    return ranks


def prompts_of(name: str) -> list[str]:
    """Return the prompts of the samples: three with the trigger, three without."""
    from training.scenes.vocabulary import with_article
    from training.subjects import SUBJECTS

    body = with_article(name) if name in SUBJECTS else f"{name} a cat"
    return [*(f"{body} {words}" for _, _, words in ASKED), *OTHERS]


def training_of(settings: LayersSettings, name: str, choice: str, seed: int) -> TrainSettings:
    """Return the settings of one training."""
    from flux.specs import configs

    chosen = settings.choices[choice]
    layers = tuple(range(configs["flux-nano"].num_layers)) if chosen == "all" else chosen
    folder = folder_of(settings, name, choice, seed)
    fields = {
        "images": str(images_of(settings, name, seed)), "trigger": name, "layers": layers,
        "rank": ranks_for(layers, settings.budget), "learning_rate": settings.learning_rate,
        "steps": settings.steps, "sizes": [settings.side], "width": settings.side, "height": settings.side,
        "num_steps": settings.num_steps, "seed": seed, "device": settings.device,
        "save_every": settings.steps, "sample_every": settings.steps, "sample_prompts": prompts_of(name),
        "output_dir": str(folder / TRAINING),
    }  # fmt: skip
    return check_settings(TrainSettings, fields)


def folder_of(settings: LayersSettings, name: str, choice: str, seed: int) -> Path:
    """Return the folder of one training."""
    return Path(settings.output_dir) / name.replace(" ", "-") / f"{choice.replace(' ', '-')}_{seed}"


def images_of(settings: LayersSettings, name: str, seed: int) -> Path:
    """Return the folder of the images that one subject or style is trained on."""
    return Path(settings.output_dir) / name.replace(" ", "-") / f"images_{seed}"


def train_one(settings: LayersSettings, name: str, choice: str, seed: int) -> None:
    """Train, unless an earlier start has done it."""
    from flux.lora.train import train
    from training.subjects import write_set

    folder = folder_of(settings, name, choice, seed)
    if (folder / TIME).is_file():
        return
    images = images_of(settings, name, seed)
    if not (images / f"{settings.images - 1:02}.txt").is_file():  # the last one that is written
        write_set(images, name, settings.images, settings.side, seed)
    times: list[float] = []
    train(training_of(settings, name, choice, seed), lambda _: times.append(time.process_time()))
    # The last step's includes the samples.
    seconds = [after - before for before, after in pairwise(times[:-1])]
    write_json(folder / TIME, {"seconds": median(seconds) if seconds else None})


def measure_one(
    settings: LayersSettings, name: str, choice: str, seed: int, encoder: "PerceptualEncoder"
) -> Outcome:
    """Measure the samples of a training that is done."""
    from training.subjects import draw_asked

    folder, training = folder_of(settings, name, choice, seed), training_of(settings, name, choice, seed)

    def samples(step: int) -> "Tensor":
        paths = (
            folder / TRAINING / "samples" / f"step_{step:06}_{n}.png" for n in range(len(prompts_of(name)))
        )
        return encoder.embed([read_image(path) for path in paths])

    before, after = samples(0), samples(settings.steps)
    likeness = {"base": 0.0, "likeness": 0.0}
    for number, (place, hour, _) in enumerate(ASKED):
        drawn = encoder.embed(draw_asked(name, place, hour, DRAWINGS, settings.side))
        for measure, features in (("base", before), ("likeness", after)):
            likeness[measure] += float((drawn @ features[number]).mean()) / len(ASKED)
    leaked = 1 - (before * after).sum(dim=1)[len(ASKED) :].mean()
    ranks = training.rank if isinstance(training.rank, dict) else {}
    return Outcome(
        name,
        choice,
        seed,
        **likeness,
        leaked=float(leaked),
        trained=sum(ranks[layer] * cost for layer, cost in costs_of(list(ranks)).items()),
        kilobytes=(folder / TRAINING / "lora.safetensors").stat().st_size / 1000,
        seconds=json.loads((folder / TIME).read_text(encoding="utf-8"))["seconds"] or 0.0,
    )


def summary(choices: Mapping[str, Choice], outcomes: Sequence[Outcome]) -> str:
    """Return the table: the mean of each measure over subjects, styles and seeds, with 95 % intervals."""
    heads = (
        "layers", "likeness", "base model's", "leaked", "trained numbers", "kB", "CPU seconds a step",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for choice, layers in choices.items():
        of_choice = [outcome for outcome in outcomes if outcome.choice == choice]
        if not of_choice:
            continue
        numbers = "all" if layers == "all" else ", ".join(map(str, layers))
        cells = [f"{choice}{'' if choice == numbers else f' ({numbers})'}"]
        for name in MEASURES:
            values = [getattr(outcome, name) for outcome in of_choice]
            if name in ("trained", "kilobytes"):
                cells.append(f"{mean(values):,.0f}")
            elif name == "seconds":
                cells.append(f"{mean(values):.2f}")
            else:
                half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
                cells.append(f"{mean(values):.3f} ± {half:.3f}" if half else f"{mean(values):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{len(outcomes)} trainings."]) + "\n"


def compare(settings: LayersSettings) -> Path:
    """Run all trainings, and return the path of the table."""
    from flux.metrics.features import PerceptualEncoder
    from flux.specs import encoder_of
    from training.subjects import NAMES

    if unknown := [name for name in settings.names if name not in NAMES]:
        raise InputError(f"Got names {unknown}, expected some of {', '.join(NAMES)}")
    for choice in settings.choices:
        training_of(settings, settings.names[0], choice, settings.seeds[0])  # whatever cannot be trained
    claim_folder(settings.output_dir)
    folder, outcomes = Path(settings.output_dir), list[Outcome]()
    encoder = PerceptualEncoder.load(encoder_of("flux-nano"))
    for seed in settings.seeds:
        for name in settings.names:
            for choice in settings.choices:
                print(f"{name}, {choice}, seed {seed}")
                train_one(settings, name, choice, seed)
                outcomes.append(measure_one(settings, name, choice, seed, encoder))
                text = StringIO()
                table = csv.DictWriter(text, list(asdict(outcomes[0])), lineterminator="\n")
                table.writeheader()
                table.writerows(map(asdict, outcomes))
                write_text(folder / "results.csv", text.getvalue())
                write_text(folder / "results.md", summary(settings.choices, outcomes))
    return folder / "results.md"


@exit_on_input_error()
def main(file: str = "training/lora_layers.json", **overrides: Any) -> None:
    """Run a comparison with the settings of a JSON file.

    Args:
        file: JSON file of settings
        overrides: fields of the settings, in place of those of the file
    """
    path = compare(read_settings(LayersSettings, file, overrides))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main, __doc__ or "", LayersSettings.model_fields, positional="file")
