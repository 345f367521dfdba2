"""A small report, and its elements."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from flux.images.io import save_image
from flux.scan.findings import Findings
from flux.scan.layers import scored_sets
from flux.scan.report import write_report

HOSTILE = "a \"red\" <script>document.title = 'run'</script> & 'cat' $5 </title>"
PROMPTS = [{"prompt": HOSTILE, "seed": 7}, {"prompt": "a dog", "seed": 1}, {"prompt": "a Dogfish", "seed": 2}]
SETS = [(0,), (1,), (2,), (3,), (0, 1, 2), (1, 3)]
SIMILARITY = np.array(
    [[0.4, 0.9, 0.8, 0.7, 0.2, 0.5], [0.5, 1.0, 0.6, 0.7, 0.1, 0.6], [0.3, 0.95, 0.4, 0.6, 0.3, 0.6]]
)
VITALITY = dict(zip(SETS, (1 - SIMILARITY.mean(0)).tolist(), strict=True))
INTERVALS = {layers: (value - 0.06, value + 0.12) for layers, value in VITALITY.items()}
BY_VITALITY = [4, 0, 5, 2, 3, 1]
RECORD = {
    "demo": "skip",
    "settings": {
        "model": "flux-<b>",
        "width": 160,
        "height": 120,
        "num_steps": 4,
        "guidance": 3.5,
        "true_cfg": None,
        "negative_prompt": "<i>",
        "prompts": PROMPTS,
        "layers": SETS,
    },
    "versions": {"flux": "0.1.0"},
}


def image_path(folder: Path, number: int, layers: tuple[int, ...]) -> Path:
    """The file of an image with these layers skipped, or of the reference."""
    return folder / str(number) / f"{'-'.join(map(str, layers)) or 'reference'}.png"


def write_images(folder: Path) -> Path:
    """Writes the images of a sweep, each of another colour."""
    rng = np.random.default_rng(0)
    for number in range(len(PROMPTS)):
        for layers in ((), *SETS):
            colour = tuple(rng.integers(0, 256, 3).tolist())
            save_image(Image.new("RGB", (160, 120), colour), image_path(folder, number, layers))
    return folder


def report(folder: Path, out: Path, vital=(0, 2), intervals=INTERVALS, **changes) -> str:
    """The HTML of a report of these scores. Changes are to the arguments of `write_report`."""
    sets = scored_sets(VITALITY, 2, vital, intervals)
    given = {
        "record": RECORD,
        "found": Findings(sets, 1 - SIMILARITY, [entry["prompt"] for entry in PROMPTS], list(vital)),
        "image_path": lambda number, layers: image_path(folder, number, layers),
        "progress": False,
    }
    write_report(out, **given | changes)
    return out.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page as (name, attributes), and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name in names]
