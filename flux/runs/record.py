"""What a run writes down about itself, so that it can be repeated."""

import platform
from importlib import metadata

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
