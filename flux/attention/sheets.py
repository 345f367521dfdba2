"""Attention as images: heat maps, and sheets of them by layer and by word."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flux.attention.watch import StepAttention
from flux.images.sheets import INK, PAPER, grid

COLOURS = "magma"


COVER = 0.7  # how much of a heat map's colour is the map's, the rest being the picture's grey


def heat_map(picture: Image.Image, values: Tensor, top: float) -> Image.Image:
    """Values of the picture's tokens ("I", 0..top) as colours over its greys, interpolated between tokens."""
    rows, columns = picture.height // 16, picture.width // 16
    fine = F.interpolate(values.reshape(1, 1, rows, columns), picture.size[::-1], mode="bilinear")[0, 0]
    return blend((fine / top).numpy(), np.asarray(picture.convert("L")) / 255)


def blend(values: np.ndarray, greys: np.ndarray) -> Image.Image:
    """Values and greys, 0..1 each, of every pixel -> the values' colours, greys shining through."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS](values)[..., :3]
    mixed = COVER * colours + (1 - COVER) * greys[..., None]
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def colour_scale(width: int, height: int, top: float) -> Image.Image:
    """What the colours of `heat_map` mean, as they look over a middle grey: a bar from 0 up to `top`."""
    text = max(11, min(width, height) // 14)
    bar = (3 * text // 2, max(2, height - 2 * text))
    shares = np.linspace(1, 0, bar[1])[:, None].repeat(bar[0], axis=1)
    image = Image.new("RGB", (width, height), PAPER)
    image.paste(blend(shares, np.full_like(shares, 0.5)), (text, text))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(text)
    for part in (0, 0.25, 0.5, 0.75, 1):
        at = (2 * text + bar[0], text + round((1 - part) * (bar[1] - 1)))
        draw.text(at, percent(part * top), font=font, fill=INK, anchor="lm")
    return image


def percent(share: float) -> str:
    """0.0312 -> "3.1%"."""
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.0f}%"


def layer_title(layer: int, num_double: int) -> str:
    return f"layer {layer} ({'double' if layer < num_double else 'single'}-stream)"


def layers_sheet(picture: Image.Image, seen: Sequence[StepAttention], num_double: int) -> Image.Image:
    """How much each image token attends to text: layers in rows, steps in columns, over the final picture.

    All maps share one scale, shown beside them.
    """
    layers = list(seen[0].layers)
    top = max(float(step.layers[layer].text.max()) for step in seen for layer in layers)
    images, captions = [], []
    for layer in layers:
        found = [(step, step.layers[layer]) for step in seen]
        maps = [heat_map(picture, attention.text[0], top) for _, attention in found]
        images.append([picture, *maps, colour_scale(*picture.size, top)])
        texts = [
            f"step {step.index}, t = {step.t:.2f}: text {percent(attention.text.mean())} "
            f"(padding {percent(attention.padding.mean())}), image {percent(attention.image.mean())}"
            for step, attention in found
        ]
        captions.append(["the picture", *texts, "of an image token's attention goes to text"])
    return grid(images, captions, [layer_title(layer, num_double) for layer in layers])


DIRECTIONS = {
    "to_words": ("image tokens attend to the word", "of an image token's attention goes to the word"),
    "from_words": ("the word attends to image tokens", "of the word's attention goes to an image token"),
}


def words_sheet(picture: Image.Image, seen: Sequence[StepAttention], num_double: int) -> Image.Image:
    """Each word's maps, mean over the steps, words in columns: for each layer a row of how much the image
    tokens attend to the word, and one of how much the word attends to them.

    The maps of a row share one scale, shown beside them.
    """
    images, captions, titles = [], [], []
    steps = ", ".join(str(step.index) for step in seen)
    for layer in seen[0].layers:
        for direction, (meaning, legend) in DIRECTIONS.items():
            per_step = [getattr(step.layers[layer], direction) for step in seen]
            maps = {word: sum(step[word][0] for step in per_step) / len(seen) for word in per_step[0]}
            top = max(float(values.max()) for values in maps.values())
            heats = [heat_map(picture, values, top) for values in maps.values()]
            images.append([picture, *heats, colour_scale(*picture.size, top)])
            texts = [
                f"{word}: up to {percent(values.max())}, mean {percent(values.mean())}"
                for word, values in maps.items()
            ]
            captions.append(["the picture", *texts, legend])
            titles.append(f"{layer_title(layer, num_double)}: {meaning} (mean of steps {steps})")
    return grid(images, captions, titles)
