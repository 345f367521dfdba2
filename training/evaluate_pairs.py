"""Measures what a LoRA that was trained on pairs does to scenes that it has not seen.

    python -m training.subjects my_pairs --name "a night cream picture of" --pairs
    python -m flux.lora train train.json --model flux-nano-kontext --images my_pairs ...
    python -m training.evaluate_pairs output/pairs/lora.safetensors --name "a night cream picture of"

The scenes are those that `training.subjects` draws with another seed, so it is known how each one looks after
the instruction. flux-nano-kontext gets the same noise with and without the LoRA. Writes table.md and
sheet.png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux import Pipeline
from flux.files import claim_folder, write_text
from flux.images.io import save_image
from flux.images.sheets import grid
from flux.metrics.features import Dino
from flux.specs import encoder_of
from training.arguments import Parser, at_least, start
from training.subjects import NAMES, Drawn, draw_set, instruction_for

MODEL = "flux-nano-kontext"
UNSEEN = 1_000  # seed of the scenes; training.subjects draws with 0
OTHER = "make it night"
"""An instruction that the LoRA should leave as it is."""
SHEET_ROWS = 6

Images = Mapping[str, Sequence[Image.Image]]


def answers(pipe: Pipeline, drawn: Sequence[Drawn], instruction: str, num_steps: int) -> list[Image.Image]:
    """Change each scene as an instruction says, each with noise of its own."""
    images = []
    for number, each in enumerate(tqdm(drawn, desc=instruction, unit="image")):
        given = {"context": each.before, "seed": number, "num_steps": num_steps, "progress": False}
        images += pipe.generate(instruction, **given).images
    return images


def table(dino: Dino, drawn: Sequence[Drawn], asked: Images, other: Images) -> str:
    """Format mean similarities by DINOv2 as Markdown.

    Args:
        dino: The metric.
        drawn: The scenes.
        asked: What each model makes of the instruction that was trained, by its name.
        other: What they make of `OTHER`, the one without the LoRA first.
    """

    def mean(references: Sequence[Image.Image], images: Sequence[Image.Image]) -> str:
        return f"{sum(dino.compare(references, images)) / len(images):.3f}"

    after, before = [each.image for each in drawn], [each.before for each in drawn]
    lines = [["", "to the scene after", "to the scene before"], ["---"] * 3]
    lines.append(["the scene before", mean(after, before), "1"])
    lines += [[name, mean(after, images), mean(before, images)] for name, images in asked.items()]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text += f"\n{OTHER!r} with the LoRA, to the same without it: {mean(*other.values())}\n"
    return f"{text}\n{len(drawn)} scenes, similarity by DINOv2.\n"


def evaluate(lora: Path, name: str, count: int, num_steps: int, folder: Path, device: str) -> Path:
    """Make, measure and show what a LoRA does to new scenes. Return the path of the table.

    Raises:
        InputError: The LoRA does not fit the model, or a file cannot be written.
    """
    drawn, instruction = draw_set(name, count, seed=UNSEEN), instruction_for(name)
    pipes = {
        "without the LoRA": Pipeline.load(MODEL, device=device),
        "with the LoRA": Pipeline.load(MODEL, lora=lora, device=device),
    }
    asked, other = (
        {title: answers(pipe, drawn, said, num_steps) for title, pipe in pipes.items()}
        for said in (instruction, OTHER)
    )
    dino = Dino.load(str(encoder_of(MODEL)), device)
    write_text(folder / "table.md", table(dino, drawn, asked, other))
    shown = range(min(count, SHEET_ROWS))
    rows = [[drawn[n].before, *(each[n] for each in asked.values()), drawn[n].image] for n in shown]
    titles = ["before", *asked, "after"]
    save_image(grid(rows, [titles] * len(rows), [instruction] * len(rows)), folder / "sheet.png")
    return folder / "table.md"


def main() -> None:
    """Run the command."""
    parser = Parser(prog="python -m training.evaluate_pairs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lora", type=Path, help="the LoRA, trained on pairs of training.subjects")
    parser.add_argument("--name", choices=NAMES, default=NAMES[0], help="the subject or style of the pairs")
    parser.add_argument("--count", type=at_least(1), default=8, help="number of scenes")
    parser.add_argument("--num_steps", type=at_least(1), default=10, help="steps of each image")
    parser.add_argument("--folder", type=Path, default=Path("output/evaluate_pairs"))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    claim_folder(arguments.folder)
    path = evaluate(**vars(arguments))
    print(path.read_text(encoding="utf-8"))
    print(path)


if __name__ == "__main__":
    start(main)
