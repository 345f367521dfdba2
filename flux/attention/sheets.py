"""Attention in images: heat maps, and sheets of them by layer and by word."""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flux.attention.maps import LayerAttention
from flux.attention.watch import StepAttention
from flux.images.sheets import INK, PAPER, grid

COLOURS = "magma"
COVER = 0.7  # share of the map in a heat map's colour; the rest is the image's grey


def heat_map(image: Image.Image, values: Tensor, top: float) -> Image.Image:
    """Draw the values of an image's tokens as colours over its greys, interpolated between tokens.

    Args:
        image: Sides in whole tokens of 16 pixels.
        values: One for each token, "I", in 0..top.
        top: The value of the last colour.
    """
    rows, columns = image.height // 16, image.width // 16
    fine = F.interpolate(values.reshape(1, 1, rows, columns), image.size[::-1], mode="bilinear")[0, 0]
    return colour(fine.div(top).numpy(), np.asarray(image.convert("L")) / 255)


def colour(values: np.ndarray, greys: np.ndarray) -> Image.Image:
    """Draw the values of pixels as colours with their greys showing through, 0..1 each, "H W"."""
    from matplotlib import colormaps

    colours = np.asarray(colormaps[COLOURS](values))[..., :3]
    mixed = COVER * colours + (1 - COVER) * greys[..., None]
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def colour_scale(width: int, height: int, top: float) -> Image.Image:
    """Draw the legend of `heat_map`: a bar from 0 up to `top`, in the colours over a middle grey."""
    text = max(11, min(width, height) // 14)
    bar = (3 * text // 2, max(2, height - 2 * text))
    shares = np.linspace(1, 0, bar[1])[:, None].repeat(bar[0], axis=1)
    image = Image.new("RGB", (width, height), PAPER)
    image.paste(colour(shares, np.full_like(shares, 0.5)), (text, text))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(text)
    for part in (0, 0.25, 0.5, 0.75, 1):
        position = (2 * text + bar[0], text + round((1 - part) * (bar[1] - 1)))
        draw.text(position, percent(part * top), font=font, fill=INK, anchor="lm")
    return image


def percent(share: float | Tensor) -> str:
    """Format a share of 1 with two digits: 0.0312 as "3.1%"."""
    return f"{100 * share:.2g}%" if share < 0.0995 else f"{100 * share:.0f}%"


def layer_title(layer: int, num_double: int) -> str:
    """Name a layer and its kind."""
    return f"layer {layer} ({'double' if layer < num_double else 'single'}-stream)"


def layers_sheet(image: Image.Image, steps: Sequence[StepAttention], num_double: int) -> Image.Image:
    """Draw how much each image token attends to text: layers in rows, steps in columns.

    All maps share one scale, shown beside them.

    Args:
        image: The finished image, the background of the maps.
        steps: The attention of the watched steps.
        num_double: Number of double-stream layers of the model.
    """
    layers = list(steps[0].layers)
    top = max(float(step.layers[layer].text.max()) for step in steps for layer in layers)
    images, captions = [], []
    for layer in layers:
        maps = [heat_map(image, step.layers[layer].text[0], top) for step in steps]
        images.append([image, *maps, colour_scale(*image.size, top)])
        texts = [_step_caption(step, step.layers[layer]) for step in steps]
        captions.append(["the image", *texts, "of an image token's attention goes to text"])
    return grid(images, captions, [layer_title(layer, num_double) for layer in layers])


def _step_caption(step: StepAttention, attention: LayerAttention) -> str:
    text, padding, image, condition = (
        percent(share.mean())
        for share in (attention.text, attention.padding, attention.image, attention.condition)
    )
    caption = f"step {step.index}, t = {step.t:.2f}: text {text} (padding {padding}), image {image}"
    return f"{caption}, condition {condition}" if attention.condition.any() else caption


Direction = Literal["to_words", "from_words"]
DIRECTIONS: dict[Direction, tuple[str, str]] = {
    "to_words": ("image tokens attend to the word", "of an image token's attention goes to the word"),
    "from_words": ("the word attends to image tokens", "of the word's attention goes to an image token"),
}
"""The two kinds of word maps: what a row of them shows, and its legend."""


def words_sheet(image: Image.Image, steps: Sequence[StepAttention], num_double: int) -> Image.Image:
    """Draw the maps of each word, averaged over the steps, with words in columns.

    Each layer has two rows: how much image tokens attend to the word, and how much the word attends to them.
    The maps of a row share one scale, shown beside them. The arguments are those of `layers_sheet`.
    """
    images, captions, titles = [], [], []
    numbers = ", ".join(str(step.index) for step in steps)
    for layer in steps[0].layers:
        for direction, (meaning, legend) in DIRECTIONS.items():
            maps = _mean_word_maps([step.layers[layer] for step in steps], direction)
            top = max(float(values.max()) for values in maps.values())
            heats = [heat_map(image, values, top) for values in maps.values()]
            images.append([image, *heats, colour_scale(*image.size, top)])
            texts = [
                f"{word}: up to {percent(values.max())}, mean {percent(values.mean())}"
                for word, values in maps.items()
            ]
            captions.append(["the image", *texts, legend])
            titles.append(f"{layer_title(layer, num_double)}: {meaning} (mean of steps {numbers})")
    return grid(images, captions, titles)


def _mean_word_maps(steps: Sequence[LayerAttention], direction: Direction) -> dict[str, Tensor]:
    """Average one layer's word maps of the first row over the steps, "I" each."""
    per_step = [step.to_words if direction == "to_words" else step.from_words for step in steps]
    return {
        word: reduce(torch.add, [maps[word][0] for maps in per_step]) / len(steps) for word in per_step[0]
    }
