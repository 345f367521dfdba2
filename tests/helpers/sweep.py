"""A small sweep of flux-nano."""

from pathlib import Path

from flux.specs import configs

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


def other_weights(path: Path) -> Path:
    """flux-nano's file but for its last bytes."""
    data = (NANO.folder / NANO.repo_flow).read_bytes()
    path.write_bytes(data[:-4] + bytes(byte ^ 1 for byte in data[-4:]))
    return path
