"""Which layers are vital: published sets, and the vital_layers.json of a scan.

Layers have global numbers: double-stream blocks first, single-stream blocks after, 0 to 56 in FLUX.1.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2

# Sets that papers publish for FLUX.1 [dev]. "stable-flow" is the paper's (arXiv 2411.14430).
PRESETS: dict[str, tuple[int, ...]] = {
    "stable-flow (FLUX.1 dev)": (0, 1, 2, 17, 18, 25, 28, 53, 54, 56),
    "stable-flow-code (FLUX.1 dev)": (0, 1, 17, 18, 25, 28, 53, 54, 56),
    "freeflux-content (FLUX.1 dev)": (0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56),
    "freeflux-position (FLUX.1 dev)": (1, 2, 4, 26, 30, 54, 55),
}


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layer numbers and ranges from a text such as "0, 1, 17-19".

    Raises:
        ValueError: A part is neither a number nor a rising range.
    """
    layers: list[int] = []
    for part in text.replace(",", " ").split():
        found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        numbers = found and range(int(found[1]), int(found[2] or found[1]) + 1)
        if not numbers:
            raise ValueError(f'Got layers {text!r}: write numbers and ranges, such as "0, 1, 17-19"')
        layers.extend(numbers)
    return tuple(dict.fromkeys(layers))


def block_of(layer: int, num_double: int) -> tuple[str, int]:
    """Name the block of a layer as ComfyUI does: ("double", 3) or ("single", 0)."""
    return ("double", layer) if layer < num_double else ("single", layer - num_double)


def check_layers(layers: Iterable[int], num_layers: int) -> None:
    """Raise ValueError if one of `layers` is not a layer of a model with `num_layers`."""
    wrong = sorted(layer for layer in layers if not 0 <= layer < num_layers)
    if wrong:
        raise ValueError(f"Got layers {wrong}, but this model numbers its layers 0..{num_layers - 1}")


def read_vital_layers(path: Path) -> tuple[int, ...]:
    """Read the vital layers of a scan, in the order of the file.

    Args:
        path: A vital_layers.json, as written by the Layer Scan node or by `demo_3_dino.py` and
            `python -m flux.scan`. Files of format 1, which have no "format", are read too.

    Raises:
        ValueError: There is no such file, it is not JSON, or it has no list "vital_layers".
    """
    if not path.is_file():
        raise ValueError(f"Got {str(path)!r}, which is no file: give a vital_layers.json")
    try:
        scan = json.loads(path.read_text(encoding="utf-8"))
        layers = scan["vital_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'Got {path}, which has no list "vital_layers": give the file of a scan') from error
    if scan.get("format", 1) not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"Got {path} of format {scan['format']!r}: these nodes read up to {FORMAT_VERSION}")
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise ValueError(f'Got {path}, whose "vital_layers" is no list of layer numbers: {layers!r}')
    return tuple(layers)


def scan_record(
    model: str,
    num_double: int,
    num_single: int,
    vitality: Mapping[int, float],
    vital_layers: Sequence[int],
    rule: Mapping[str, Any],
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of a vital_layers.json.

    Args:
        model: Name of the model that was scanned.
        num_double: Number of its double-stream blocks.
        num_single: Number of its single-stream blocks.
        vitality: 1 minus the mean similarity, by layer.
        vital_layers: The layers chosen from them, the most vital first.
        rule: The metric, and how the layers were chosen.
        protocol: Prompts, seed, steps and size of the scan.
    """
    return {
        "format": FORMAT_VERSION,
        "model": model,
        "num_double": num_double,
        "num_single": num_single,
        "vital_layers": list(vital_layers),
        "rule": dict(rule),
        "vitality": {f"{layer:02d}": {"vitality": value} for layer, value in sorted(vitality.items())},
        "protocol": dict(protocol),
    }
