"""What a run writes down about itself, so that it can be repeated."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

from flux.errors import InputError
from flux.images.io import write_text
from flux.settings.demos import ModelSettings, Settings

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of Python, of this package, and of the packages that results depend on."""
    from flux import __version__

    return {
        "python": platform.python_version(),
        "flux": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
    }


def run_record(settings: Settings, **more) -> dict:
    """The contents of a run.json: which demo reads it, its full settings, versions, and what is given."""
    return {"demo": settings.demo, "settings": settings.to_json(), "versions": versions(), **more}


def about(settings: ModelSettings, prompt: str, seed: int, **more) -> dict | None:
    """What a picture's file says of it: a run record, and the picture's own prompt and seed. None if not
    wanted.
    """
    if not settings.metadata:
        return None
    return {"model": settings.model, "prompt": prompt, "seed": seed, **more, **run_record(settings)}


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
