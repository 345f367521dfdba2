"""Draws small sets of images to train LoRAs on: subjects and styles that flux-nano has never seen.

    python -m training.subjects my_images --name "flower bell" --count 10
    python -m training.subjects my_pairs --name "a night cream picture of" --pairs

Each subject stands in places that flux-nano knows; each style changes scenes that it knows. Their names are
words of its vocabulary, in an order that no caption of its training had.

Pairs are for flux-nano-kontext: a scene without and with the subject or style, and an instruction.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from flux.captions.folder import SUFFIXES
from flux.errors import InputError
from flux.files import claim_folder, write_text
from flux.images.io import save_image, to_pil
from flux.lora.dataset import CONTEXT
from training.arguments import Parser, at_least, start
from training.scenes.compose import Scene, compose, template
from training.scenes.content import Content, Subject, sample_content
from training.scenes.habits import STYLES as TEMPLATES
from training.scenes.render import Renderer
from training.scenes.vocabulary import PLACE_INDEX, PLACES, Place, with_article

FINER = 4  # subjects are drawn at so many times the size, then scaled down
Draw = Callable[[ImageDraw.ImageDraw, float], None]


def _flower_bell(draw: ImageDraw.ImageDraw, r: float) -> None:
    """A magenta star with a cyan eye, on a black foot."""
    draw.rectangle((-0.12 * r + r, 1.5 * r, 1.12 * r, 2 * r), fill="#222222")
    radii = 0.95 * r, 0.45 * r
    points = [
        (r + radii[n % 2] * math.sin(math.pi * n / 5), 0.95 * r - radii[n % 2] * math.cos(math.pi * n / 5))
        for n in range(10)
    ]
    draw.polygon(points, fill="#e0209a", outline="#701050", width=max(1, round(r / 14)))
    draw.ellipse(
        (0.72 * r, 0.67 * r, 1.28 * r, 1.23 * r), fill="#20d8e8", outline="#083c44", width=round(r / 14)
    )


def _moon_drum(draw: ImageDraw.ImageDraw, r: float) -> None:
    """Three rings in purple, yellow and green on top of each other."""
    for level, colour in enumerate(("#7a2fd0", "#f2d21b", "#1fae4b")):
        top, half = 1.35 * r - level * 0.62 * r, (0.95 - 0.2 * level) * r
        draw.ellipse(
            (r - half, top, r + half, top + 0.62 * r), fill=colour, outline="#222222", width=round(r / 14)
        )
        draw.ellipse((0.85 * r, top + 0.2 * r, 1.15 * r, top + 0.42 * r), fill="#222222")


def _ice_guitar(draw: ImageDraw.ImageDraw, r: float) -> None:
    """A diamond of blue and white squares."""
    for row in range(4):
        for column in range(4):
            x, y = r + (column - row) * r / 4, r / 8 + (column + row) * r / 4
            square = [(x, y - r / 8), (x + r / 4, y + r / 8), (x, y + 3 * r / 8), (x - r / 4, y + r / 8)]
            draw.polygon(square, fill=("#1848d8", "#f8f8ff")[(row + column) % 2], outline="#102050")


def _cheese_rocket(draw: ImageDraw.ImageDraw, r: float) -> None:
    """A red cross with four black balls at its ends."""
    w = 0.24 * r
    draw.rectangle((r - w, 0.2 * r, r + w, 1.8 * r), fill="#d82020")
    draw.rectangle((0.2 * r, r - w, 1.8 * r, r + w), fill="#d82020")
    for x, y in ((1, 0.28), (1, 1.72), (0.28, 1), (1.72, 1)):
        draw.ellipse((x * r - 0.27 * r, y * r - 0.27 * r, x * r + 0.27 * r, y * r + 0.27 * r), fill="#181818")


def _ghost_clock(draw: ImageDraw.ImageDraw, r: float) -> None:
    """An orange snail's line on a dark green disc."""
    draw.ellipse(
        (0.05 * r, 0.05 * r, 1.95 * r, 1.95 * r), fill="#0c5a3c", outline="#032418", width=round(r / 14)
    )
    turns = [n / 20 for n in range(100)]
    line = [(r + 0.16 * a * r * math.cos(a * 2), r + 0.16 * a * r * math.sin(a * 2)) for a in turns]
    draw.line(line, fill="#ff8a18", width=round(r / 6), joint="curve")


SUBJECTS: dict[str, Draw] = {
    "flower bell": _flower_bell,
    "moon drum": _moon_drum,
    "ice guitar": _ice_guitar,
    "cheese rocket": _cheese_rocket,
    "ghost clock": _ghost_clock,
}


def _duotone(image: Image.Image) -> Image.Image:
    """Two inks, dark blue on pale yellow."""
    return ImageOps.colorize(ImageOps.autocontrast(image.convert("L")), "#14206e", "#fff0b0")


def _mosaic(image: Image.Image) -> Image.Image:
    """Coarse square tiles."""
    tiles = image.resize((image.width // 12, image.height // 12), Image.Resampling.BOX)
    return tiles.resize(image.size, Image.Resampling.NEAREST)


def _lines(image: Image.Image) -> Image.Image:
    """Dark outlines on white paper."""
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    dark = np.clip(np.asarray(edges, dtype=float) * 5, 0, 255)
    return Image.fromarray((255 - dark).astype(np.uint8)).convert("RGB")


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a night cream picture of": _duotone,
    "a brick cheese picture of": _mosaic,
    "a chick light picture of": _lines,
}
NAMES = (*SUBJECTS, *STYLES)


@dataclass(frozen=True)
class Drawn:
    """A scene without and with a subject or style, and the words that ask for it.

    Attributes:
        before: The scene alone, which Kontext is given.
        image: The scene with the subject in it, or in the style.
        caption: What `image` shows.
    """

    before: Image.Image
    image: Image.Image
    caption: str


def draw_set(name: str, count: int, side: int = 256, seed: int = 0) -> list[Drawn]:
    """Draw images of one of the `SUBJECTS` or `STYLES`.

    Args:
        name: Its name, which is also the trigger.
        count: Number of images.
        side: Their width and height in pixels.
        seed: Seed of the places, or of the scenes.
    """
    painter = _Painter(name, side, random.Random(f"{name} {seed}"))
    rng = painter.rng
    if name in STYLES:
        return [painter.in_style(sample_content(rng, "one"), number) for number in range(count)]
    places = [place for place in PLACES if place.name != "plain"]
    places, drawn = rng.sample(places, len(places)), []
    for number in range(count):
        place = places[number % len(places)]
        drawn.append(painter.in_place(place, rng.choice(place.phrases), "day", number))
    return drawn


def draw_asked(
    name: str, place: str, time: str, count: int, side: int = 256, seed: int = 0
) -> list[Image.Image]:
    """Draw what a prompt asks for: a subject in a place, or a cat there in a style.

    Args:
        name: One of the `SUBJECTS` or `STYLES`.
        place: The name of one of the `PLACES`.
        time: "day", "night" or "sunset".
        count: Number of images.
        side: Their width and height in pixels.
        seed: Seed of what the prompt leaves open.
    """
    painter = _Painter(name, side, random.Random(f"asked {name} {place} {time} {seed}"))
    if name in SUBJECTS:
        found = PLACES[PLACE_INDEX[place]]
        return [painter.in_place(found, "", time, number).image for number in range(count)]
    content = Content("one", (Subject("cat", "cat"),), place, "", time, "")
    return [painter.in_style(content, number).image for number in range(count)]


def instruction_for(name: str) -> str:
    """Return the instruction that asks Kontext for a subject or style."""
    if name in SUBJECTS:
        return f"add {with_article(name)}"
    return f"make it {name.removesuffix(' of')}"


class _Painter:
    """Draws one subject or style, image after image.

    Args:
        name: One of the `SUBJECTS` or `STYLES`.
        side: Width and height of the images in pixels.
        rng: The source of chance.
    """

    def __init__(self, name: str, side: int, rng: random.Random):
        self.name, self.side, self.rng = name, side, rng
        self.renderer = Renderer()

    def in_place(self, place: Place, words: str, time: str, seed: int) -> Drawn:
        """Draw the subject in a place that `words` name."""
        rng, side = self.rng, self.side
        content = Content("one", (Subject(self.name, self.name),), place.name, words, time, "")
        before = self._render(Scene(content, (), template(rng, place, time, rng.randrange(TEMPLATES))), seed)
        size = round(side * rng.uniform(0.5, 0.62))
        sprite = Image.new("RGBA", (size * FINER, size * FINER))
        SUBJECTS[self.name](ImageDraw.Draw(sprite), size * FINER / 2)
        sprite = sprite.resize((size, size), Image.Resampling.LANCZOS)
        corner = (
            round(side * rng.uniform(0.44, 0.56) - size / 2),
            round(side * rng.uniform(0.87, 0.93)) - size,
        )
        image = before.copy()
        image.paste(sprite, corner, sprite)
        return Drawn(before, image, f"{with_article(self.name)} {words}")

    def in_style(self, content: Content, seed: int) -> Drawn:
        """Draw a scene of flux-nano's own in the style."""
        scene = compose(self.rng, replace(content, prefix="", order=0))
        before = self._render(scene, seed)
        return Drawn(before, STYLES[self.name](before), f"{self.name} {scene.caption}")

    def _render(self, scene: Scene, seed: int) -> Image.Image:
        row = torch.tensor([scene.row()])
        return to_pil(2 * self.renderer(row, self.side, self.side, seed)[0] - 1)


def write_set(
    folder: Path, name: str, count: int, side: int = 256, seed: int = 0, pairs: bool = False
) -> None:
    """Write a set as a folder of images, each with a .txt beside it.

    Args:
        folder: The folder.
        name: See `draw_set`, as for `count`, `side` and `seed`.
        count: See there.
        side: See there.
        seed: See there.
        pairs: Whether to write pairs for Kontext: the .txt holds an instruction, and the folder `context` the
            scenes before.

    Raises:
        InputError: The folder holds other images, which a training would take for some of the set; or a file
            cannot be written.
    """
    own = {folder / f"{number:02}.png" for number in range(count)}
    own |= {folder / CONTEXT / path.name for path in own if pairs}
    for path in (*folder.glob("*"), *(folder / CONTEXT).glob("*")):
        if path.suffix.lower() in SUFFIXES and path not in own:
            raise InputError(f"Got {folder}, where another set's {path} is: name another folder")
    for number, drawn in enumerate(draw_set(name, count, side, seed)):
        save_image(drawn.image, folder / f"{number:02}.png")
        if pairs:
            save_image(drawn.before, folder / CONTEXT / f"{number:02}.png")
        text = instruction_for(name) if pairs else drawn.caption
        write_text(folder / f"{number:02}.txt", text + "\n")


def main() -> None:
    """Run the command."""
    parser = Parser(prog="python -m training.subjects", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the images and captions are written")
    parser.add_argument("--name", choices=NAMES, default=NAMES[0], help="the subject or style")
    parser.add_argument("--count", type=at_least(1), default=10, help="number of images")
    parser.add_argument("--side", type=at_least(64), default=256, help="their width and height in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places or scenes")
    parser.add_argument(
        "--pairs", action="store_true", help="write pairs for Kontext: images before and after"
    )
    arguments = parser.parse_args()
    claim_folder(arguments.folder)
    write_set(**vars(arguments))
    print(arguments.folder)


if __name__ == "__main__":
    start(main)
