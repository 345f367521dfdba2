"""Which layers are vital: skip each one during sampling, score with DINOv2 how much the images change."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BAR, GAP, HEIGHT, MARGIN = 12, 4, 240, 24  # pixels of the chart


class DinoScore:
    """Cosine similarity of two images' DINOv2 features, as the paper scores changes (appendix A.1)."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Normalised class tokens of images "B H W 3" in 0..1: "B C"."""
        pixels = [(image.clamp(0, 1) * 255).round().byte().cpu().numpy() for image in images]
        inputs = self.processor(images=pixels, return_tensors="pt").to(self.device)
        features = self.model(**inputs).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def measure(
    render: Callable[[int | None], Iterable[Tensor]],
    features: Callable[[Tensor], Tensor],
    layers: Iterable[int],
) -> dict[int, float]:
    """Measure the vitality of layers: 1 minus the mean similarity of images with and without each.

    Args:
        render: Draws the same images with a layer skipped, or with none if None, "1 H W 3" each.
        features: Normalised features of images, "B C".
        layers: The layers to skip, one after the other.
    """
    full = torch.cat([features(image) for image in render(None)])
    vitality = {}
    for layer in layers:
        skipped = torch.cat([features(image) for image in render(layer)])
        vitality[layer] = 1 - float((skipped * full).sum(-1).mean())
    return vitality


def most_vital(vitality: dict[int, float], top: int) -> tuple[int, ...]:
    """The `top` layers of highest vitality, highest first. Of equal ones, the lower number comes first."""
    return tuple(sorted(vitality, key=lambda layer: (-vitality[layer], layer))[:top])


def bar_chart(vitality: dict[int, float], num_double: int, vital: Sequence[int]) -> Tensor:
    """Draw the vitality of each layer as bars, the vital ones in full colour: "1 H W 3" in 0..1.

    Double-stream layers are blue, single-stream layers orange.
    """
    from PIL import Image, ImageDraw

    layers, highest = sorted(vitality), max(max(vitality.values()), 1e-6)
    width = 2 * MARGIN + len(layers) * (BAR + GAP)
    image = Image.new("RGB", (width, HEIGHT + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 6), f"vitality of each layer, highest {highest:.3f}", fill="black")
    for place, layer in enumerate(layers):
        left, bottom = MARGIN + place * (BAR + GAP), MARGIN + HEIGHT
        colour = (40, 90, 200) if layer < num_double else (220, 120, 20)
        if layer not in vital:
            colour = tuple((channel + 2 * 255) // 3 for channel in colour)
        length = max(round(vitality[layer] / highest * (HEIGHT - 8)), 1)
        draw.rectangle((left, bottom - length, left + BAR - 1, bottom), fill=colour)
        if len(layers) <= 20 or layer % 5 == 0 or layer in vital:
            draw.text((left, bottom + 4), str(layer), fill="black")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, 3).float() / 255


def check_writable(path: Path) -> None:
    """Raise ValueError if a file cannot be written at `path`. A scan takes long, so this comes first."""
    if path.is_dir():
        raise ValueError(f"Got file {str(path)!r}, which is a folder: give a file's path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished_of(path).touch()
    except OSError as error:
        raise ValueError(f"Got file {str(path)!r}, which cannot be written: {error.strerror}") from error


def write_scan(path: Path, record: dict[str, Any]) -> None:
    """Write a vital_layers.json whole or not at all."""
    unfinished_of(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished_of(path).replace(path)


def unfinished_of(path: Path) -> Path:
    """The file beside `path` that is written first."""
    return path.with_name(f".{path.name}.part")
