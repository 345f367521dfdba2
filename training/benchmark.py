"""Renders a benchmark of edits for flux-nano: held-out scenes before and after, in PIE-Bench's layout.

    python -m training.benchmark --folder output/benchmark --count 240

`flux.evaluate.benchmark` describes the folder. `training.evaluate_edits` runs on it. The first edits of a
larger count are those of a smaller one; `--first 600` begins with the 600th. Training draws its scenes from
other seeds.
"""

import random
from difflib import SequenceMatcher
from pathlib import Path

from flux.evaluate.benchmark import IMAGES, KINDS, encode_mask, write_benchmark
from flux.files import claim_folder
from flux.images.io import save_image, to_pil
from training.arguments import Parser, at_least, start
from training.judge import asked_for
from training.scenes.edits import Pair, sample_pair
from training.scenes.instructions import instruction
from training.scenes.render import Renderer

# The benchmark's kinds, drawn in turn, and the edits that make them.
EDITS = {
    "replace": ("replace",),
    "add": ("add",),
    "remove": ("remove",),
    "background": ("background",),
    "time": ("time",),
    "attribute": ("hat", "recolour"),
}


def draw(number: int) -> tuple[str, Pair]:
    """Draw the kind and the scenes of the benchmark's edit of that number."""
    turn, place = divmod(number, len(EDITS))
    kind, edits = list(EDITS.items())[place]
    # Training and its evaluation seed with numbers and the names of stages.
    return kind, sample_pair(random.Random(f"benchmark {number}"), edits[turn % len(edits)])


def mark_changes(prompt: str, other: str) -> str:
    """Put brackets around the words of `prompt` that `other` does not have, as PIE-Bench does."""
    words = prompt.split()
    parts = []
    for tag, begin, end, _, _ in SequenceMatcher(None, words, other.split(), False).get_opcodes():
        text = " ".join(words[begin:end])
        if text:
            parts.append(text if tag == "equal" else f"[{text}]")
    return " ".join(parts)


def write(folder: Path, count: int, side: int = 256, first: int = 0) -> None:
    """Render `count` edits of `side` x `side` pixels into the folder, from number `first` on."""
    renderer, entries = Renderer(), []
    for number in range(first, first + count):
        kind, pair = draw(number)
        before, after, mask = renderer.pairs([pair], side, side, seed=number)
        names = [f"{kind}/{number:04d}{part}.png" for part in ("", "_target")]
        for name, image in zip(names, (before, after)):
            save_image(to_pil(2 * image[0] - 1), folder / IMAGES / name)
        source, target = pair.before.caption, pair.after.caption
        entry = {
            "image_path": names[0],
            "target_image_path": names[1],
            "original_prompt": mark_changes(source, target),
            "editing_prompt": mark_changes(target, source),
            "editing_instruction": instruction(random.Random(f"instruction {number}"), pair),
            "editing_type_id": next((key for key, name in KINDS.items() if name == kind), "0"),
            "blended_word": "",
            "mask": encode_mask(mask[0, 0].numpy()),
            "kind": kind,
            "seed": number,
            "asked": asked_for(pair.edit, pair.before.content, pair.after.content),
        }
        entries.append((f"{number:012d}", entry))
    write_benchmark(folder, entries)


def main() -> None:
    """Run the command."""
    summary = (__doc__ or "").splitlines()[0]
    parser = Parser(prog="python -m training.benchmark", description=summary)
    parser.add_argument("--folder", type=Path, default=Path("output/benchmark"), help="written to")
    parser.add_argument("--count", type=at_least(1), default=240, help="number of edits")
    parser.add_argument("--first", type=at_least(0), default=0, help="the number of the first edit")
    arguments = parser.parse_args()
    claim_folder(arguments.folder)
    write(arguments.folder, arguments.count, first=arguments.first)
    print(arguments.folder)


if __name__ == "__main__":
    start(main)
