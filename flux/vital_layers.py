"""Which layers an edit injects in: published sets by name, a scan's, a model's own."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from flux.errors import InputError
from flux.files import write_text
from flux.intervention import check_layers
from flux.specs import VITAL_LAYERS_DEV, ModelSpec

# Sets that others publish for FLUX.1-dev. The methods differ in more than the set: what they take there, and
# when, is said beside it and has settings of its own (`parts`, `mask`, `inject_until`).
PRESETS: dict[str, tuple[int, ...]] = {
    "stable-flow": VITAL_LAYERS_DEV,
    # The set in the method's public code, which lets layer 2 go for looser edits.
    "stable-flow-code": tuple(layer for layer in VITAL_LAYERS_DEV if layer != 2),
    # FreeFlux: layers that answer to content, for non-rigid edits, and to position, for added objects; its
    # background edits take all layers, with a mask.
    "freeflux-content": (0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56),
    "freeflux-position": (1, 2, 4, 26, 30, 54, 55),
    "freeflux-background": tuple(range(57)),
    # RF-Solver-Edit: values only, in the first steps; FireFlow: the same layers, in the first of eight steps.
    "rf-solver-edit": tuple(range(39, 57)),
    "fireflow": tuple(range(39, 57)),
    # KV-Edit: the tokens outside the mask, everywhere.
    "kv-edit": tuple(range(57)),
    # LayerVerse: its layers of masked keys and values.
    "layerverse": (1, 51, 52, 53, 54, 55, 56),
}


def find_vital_layers(
    choice: str | Sequence[int], spec: ModelSpec, checkpoint: str | None = None
) -> tuple[int, ...]:
    """The layers that an edit injects in, the most vital first: a list of them, "auto" (the model's own),
    "all", a preset, or a scan's JSON file.

    Raises:
        InputError: a model whose vital layers nobody knows, an unknown preset, or a file that is no scan's.
    """
    scan = remembered_scan(checkpoint) if checkpoint else None
    if choice == "auto" and scan and scan.is_file():
        layers = _read_scan(scan)
        print(f"vital layers {layers}, from a scan of this checkpoint: {scan}")
    elif choice == "auto":
        if spec.vital_layers is None:
            raise InputError(
                "The vital layers of this model are not known: scan it (python -m flux.scan) and give the "
                'vital_layers.json, or try "stable-flow", the set of flux-dev'
            )
        layers = spec.vital_layers
    elif choice == "all":
        layers = range(spec.num_layers)
    elif isinstance(choice, str):
        layers = PRESETS[choice] if choice in PRESETS else _read_scan(Path(choice))
    else:
        layers = choice
    check_layers(layers, spec.num_layers)
    return tuple(layers)


def _read_scan(path: Path) -> list[int]:
    if not path.is_file():
        raise InputError(
            f"Got vital_layers {str(path)!r}, which is no file and no preset: give a vital_layers.json, a "
            f'list of layers, "auto", "all", or one of {", ".join(PRESETS)}'
        )
    try:
        scan = json.loads(path.read_text(encoding="utf-8"))
        layers = scan["vital_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'Got {path}, which has no list "vital_layers": give the file that demo_3_dino.py wrote'
        ) from error
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise InputError(f'Got {path}, whose "vital_layers" is no list of layer numbers: {layers!r}')
    known = scan.get("vitality", {})
    return sorted(layers, key=lambda layer: -known.get(f"{layer:02d}", {}).get("vitality", 0))


def remembered_scan(checkpoint: str) -> Path:
    """Where the scan of a checkpoint (its fingerprint) is remembered for demo 4's "auto"."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flux-stable-flow" / "scans" / f"{checkpoint}.json"


def remember_scan(path: Path) -> bool:
    """Remembers the vital_layers.json at `path` for its checkpoint, if it can stand for it: all layers truly
    bypassed one by one, and enough prompts for a confidence interval. Returns whether it does.
    """
    scan = json.loads(path.read_text(encoding="utf-8"))
    protocol, known = scan["protocol"], all("low" in layer for layer in scan["vitality"].values())
    whole = protocol["layers"] == "all" and protocol.get("scale", 0) == 0 and known
    if not (whole and scan["checkpoint"] and scan["vital_layers"]):
        return False
    try:
        write_text(remembered_scan(scan["checkpoint"]), path.read_text(encoding="utf-8"))
    except InputError as error:  # the scan is done, and demo 4 can be given its file
        print(f'not remembered for the "auto" of demo 4: {error}')
        return False
    return True
