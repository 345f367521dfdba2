"""The record that a run leaves, so that it can be repeated."""

import platform
from importlib import metadata
from typing import Any

from flux.settings.demos import ModelSettings, Settings

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the packages that results depend on."""
    from flux import __version__

    return {
        "python": platform.python_version(),
        "flux": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
    }


def run_record(settings: Settings, **more: Any) -> dict[str, Any]:
    """Return the contents of a run.json: the demo that reads it, its settings, the versions, and `more`."""
    return {"demo": settings.demo, "settings": settings.to_json(), "versions": versions(), **more}


def image_metadata(settings: ModelSettings, prompt: str, seed: int, **more: Any) -> dict[str, Any] | None:
    """Return what an image file says about its image: a run record, its own prompt and seed, and `more`.

    None if the settings ask for no metadata.
    """
    if not settings.metadata:
        return None
    return {"model": settings.model, "prompt": prompt, "seed": seed, **more, **run_record(settings)}
