"""A small sweep of flux-nano, and what there is in its folder."""

from pathlib import Path
from typing import Any

from flux.images.io import read_image
from flux.loaded_model import LoadedModel
from flux.scan.sweep import sweep
from flux.settings.complete import resolve
from flux.settings.demos import SkipSettings
from flux.settings.resolved import ResolvedSkip
from flux.specs import configs
from helpers.images import difference

ROOT = Path(__file__).resolve().parents[2]
NANO = configs["flux-nano"]
PROMPTS = [{"prompt": "a dog on the grass", "seed": 3}, {"prompt": "a red car on the street", "seed": 9}]
SETTINGS = {
    "prompts": PROMPTS,
    "layers": [0, 12, 5],
    "width": 96,
    "height": 64,
    "num_steps": 2,
    "true_cfg": 1.0,
    "device": "cpu",
    "dtype": "float32",
    "watermark": False,
}


def skip_settings(folder: Path, **changes: Any) -> ResolvedSkip:
    """The settings of the small sweep."""
    return resolve(SkipSettings(**{**SETTINGS, "output_dir": str(folder), **changes}))


def run_sweep(pipe: LoadedModel | None, folder: Path, **changes: Any) -> Path:
    """Runs the small sweep and returns its folder."""
    return sweep(skip_settings(folder, **changes), pipe, progress=False)


def names(folder: Path) -> set[str]:
    """All files in the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def image_names(folder: Path) -> set[str]:
    """The references and images with skipped layers."""
    return {name for name in names(folder) if name.startswith("prompt")}


def same_sweeps(a: Path, b: Path) -> bool:
    """Whether two folders have the same files and the same pixels, and so the same scores."""
    return names(a) == names(b) and all(
        difference(read_image(a / name), read_image(b / name)) == 0 for name in image_names(a) | {"grid.png"}
    )


def other_weights(path: Path) -> Path:
    """Writes flux-nano's file with other last bytes."""
    data = (NANO.folder / NANO.repo_flow).read_bytes()
    path.write_bytes(data[:-4] + bytes(byte ^ 1 for byte in data[-4:]))
    return path
