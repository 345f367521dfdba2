"""Settings of a small image whose attention is watched."""

from flux.settings.complete import resolve
from flux.settings.demos import LayerSettings
from flux.settings.resolved import ResolvedLayer

DOG = "a dog wearing a top hat on the grass"


def settings(**fields) -> ResolvedLayer:
    """Settings of a film, with these fields changed."""
    small = {"prompt": DOG, "seed": 7, "width": 96, "height": 64, "num_steps": 4, "layers": (3, 12)}
    return resolve(LayerSettings(**{**small, **fields}))
