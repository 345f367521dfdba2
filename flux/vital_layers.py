"""The layers that an edit injects in: a published set, the result of a scan, or the model's own."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux.errors import InputError
from flux.files import write_text
from flux.intervention import check_layers
from flux.specs import VITAL_LAYERS_DEV, ModelSpec, configs

# Sets that papers publish for FLUX.1-dev. Their methods differ in more than the set: what they inject and in
# which steps is noted beside it, and is chosen by other settings (`parts`, `mask`, `inject_until`).
PRESETS: dict[str, tuple[int, ...]] = {
    "stable-flow": VITAL_LAYERS_DEV,
    # The set in the method's public code, which leaves out layer 2 for looser edits.
    "stable-flow-code": tuple(layer for layer in VITAL_LAYERS_DEV if layer != 2),
    # FreeFlux: layers that depend on content, for non-rigid edits, and layers that depend on position, for
    # added objects. Its background edits use all layers, with a mask.
    "freeflux-content": (0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56),
    "freeflux-position": (1, 2, 4, 26, 30, 54, 55),
    "freeflux-background": tuple(range(57)),
    # RF-Solver-Edit injects values only, in the first steps. FireFlow uses the same layers, in the first of
    # eight steps.
    "rf-solver-edit": tuple(range(39, 57)),
    "fireflow": tuple(range(39, 57)),
    # KV-Edit injects the tokens outside the mask in all layers.
    "kv-edit": tuple(range(57)),
    # LayerVerse injects masked keys and values.
    "layerverse": (1, 51, 52, 53, 54, 55, 56),
}


def find_vital_layers(
    choice: str | Sequence[int], spec: ModelSpec, checkpoint: str | None = None
) -> tuple[int, ...]:
    """Find the layers that an edit injects in.

    Args:
        choice: A list of layers, "all", the name of a preset, the vital_layers.json of a scan, or "auto": a
            remembered scan of this checkpoint, otherwise the model's own layers.
        spec: The model.
        checkpoint: The fingerprint of its weights, if known.

    Returns:
        The layers, the most vital first as far as that is known.

    Raises:
        InputError: The model's vital layers are not known, there is no such preset or file, the file is not
            that of a scan of this model, or the model lacks one of the layers.
    """
    scan = remembered_scan(checkpoint) if checkpoint else None
    if choice == "auto" and scan and scan.is_file():
        layers = _read_scan(scan, spec)
        print(f"vital layers {layers}, from a scan of this checkpoint: {scan}")
    elif choice == "auto":
        if spec.vital_layers is None:
            fits = spec.num_layers > max(VITAL_LAYERS_DEV)
            raise InputError(
                "The vital layers of this model are not known: scan it (python -m flux.scan) and give the "
                "vital_layers.json" + (', or try "stable-flow", the set of flux-dev' if fits else "")
            )
        layers = spec.vital_layers
    elif choice == "all":
        layers = range(spec.num_layers)
    elif isinstance(choice, str):
        layers = PRESETS[choice] if choice in PRESETS else _read_scan(Path(choice), spec)
    else:
        layers = choice
    check_layers(layers, spec.num_layers)
    return tuple(layers)


def _read_scan(path: Path, spec: ModelSpec) -> list[int]:
    """Read the vital_layers.json of a scan of this model, the most vital layers first."""
    if not path.is_file():
        raise InputError(
            f"Got layers {str(path)!r}, which is no file and no preset: give a vital_layers.json, a "
            f'list of layers, "auto", "all", or one of {", ".join(PRESETS)}'
        )
    try:
        scan = json.loads(path.read_text(encoding="utf-8"))
        layers, vitality = scan["vital_layers"], scan.get("vitality", {})
        vitality = {layer: numbers.get("vitality", 0) for layer, numbers in vitality.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Got {path}, which is no file of vital layers: give the one that demo_3_dino.py wrote"
        ) from error
    if layers == []:
        raise InputError(f"Got {path}, a scan that found no vital layer: lower its threshold, or give top")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f'Got {path}, whose "vital_layers" is no list of layer numbers: {layers!r}')
    _check_model(path, scan, spec)
    return sorted(layers, key=lambda layer: -vitality.get(f"{layer:02d}", 0))


def _check_model(path: Path, scan: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise InputError if a scan is that of another model, or of one with another number of layers."""
    name = next((name for name, known in configs.items() if known == spec), None)
    scanned = scan.get("model")
    if name and scanned and scanned != name:
        raise InputError(
            f"Got {path}, a scan of {scanned}, but the model is {name}: scan it (python -m flux.scan), or "
            f"give the layers {scan['vital_layers']} as a list to try them all the same"
        )
    protocol = scan.get("protocol")
    is_whole = isinstance(protocol, dict) and protocol.get("layers") == "all"
    count = sum(layers.isdecimal() for layers in scan.get("vitality", {}))
    if is_whole and count and count != spec.num_layers:
        raise InputError(
            f"Got {path}, a scan of a model with {count} layers, but {name or 'this model'} has "
            f"{spec.num_layers}: scan it (python -m flux.scan)"
        )


def remembered_scan(checkpoint: str) -> Path | None:
    """Return the path at which the scan of a checkpoint is remembered. The file need not exist.

    Args:
        checkpoint: The fingerprint of the checkpoint.

    Returns:
        The path. None if this user has no home folder, and no other folder for caches is named.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        return None
    return Path(cache, "flux-stable-flow", "scans", f"{checkpoint}.json")


def remember_scan(path: Path) -> bool:
    """Remember a vital_layers.json for its checkpoint, for the "auto" of later edits.

    It must be that of a complete scan: each layer was skipped by itself, with nothing of its output kept, and
    with enough prompts for confidence intervals.

    Returns:
        Whether the scan is remembered.
    """
    scan = json.loads(path.read_text(encoding="utf-8"))
    protocol, has_intervals = scan["protocol"], all("low" in layer for layer in scan["vitality"].values())
    is_complete = protocol["layers"] == "all" and protocol.get("scale", 0) == 0 and has_intervals
    if not (is_complete and scan["checkpoint"] and scan["vital_layers"]):
        return False
    remembered = remembered_scan(scan["checkpoint"])
    if remembered is None:
        print('not remembered for the "auto" of demo 4: there is no home folder, set XDG_CACHE_HOME')
        return False
    try:
        write_text(remembered, path.read_text(encoding="utf-8"))
    except InputError as error:  # no reason to fail: the scan is done, and demo 4 can read its file
        print(f'not remembered for the "auto" of demo 4: {error}')
        return False
    return True
