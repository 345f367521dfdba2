"""Edits that keep the rest: the reference's image keys and values, taken over in the vital layers (Stable
Flow, 3.2).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flux.errors import InputError
from flux.images import fit
from flux.intervention import NOTHING, Intervention, check_layers
from flux.pipeline import Pipeline
from flux.record import remembered_scan
from flux.sampling import euler_step, invert, window
from flux.specs import VITAL_LAYERS_DEV, ModelSpec

PRESETS: dict[str, tuple[int, ...]] = {
    "stable-flow": VITAL_LAYERS_DEV,
    # The set in the method's public code, which lets layer 2 go for looser edits.
    "stable-flow-code": tuple(layer for layer in VITAL_LAYERS_DEV if layer != 2),
}


def find_vital_layers(
    choice: str | Sequence[int], spec: ModelSpec, checkpoint: str | None = None
) -> tuple[int, ...]:
    """The layers that an edit injects in: a list of them, "auto" (the model's own), a preset, or a scan's
    JSON file.

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
            f'list of layers, "auto", or one of {", ".join(PRESETS)}'
        )
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["vital_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'Got {path}, which has no list "vital_layers": give the file that demo_3_dino.py wrote'
        ) from error
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise InputError(f'Got {path}, whose "vital_layers" is no list of layer numbers: {layers!r}')
    return layers


@dataclass(frozen=True)
class Edits:
    """A reference and its edits. For a photograph, the reference is what the autoencoder makes of it."""

    reference: Image.Image
    edits: list[Image.Image]


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Peak signal-to-noise ratio between two pictures of one size, in dB; None if they are equal."""
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return round(float(10 * np.log10(255**2 / error)), 3) if error else None


def edit(
    pipe: Pipeline,
    prompt: str,
    edits: Sequence[str],
    *,
    layers: Sequence[int],
    seed: int = 0,
    width: int,
    height: int,
    num_steps: int,
    guidance: float,
    true_cfg: float = 1.0,
    negative_prompt: str = "",
    inject_from: float = 0.0,
    inject_until: float = 1.0,
    photo: Image.Image | None = None,
    nudging: float = 1.15,
    batch_size: int = 1,
    watermark: bool = False,
    progress: bool = True,
) -> Edits:
    """The picture of `prompt` and one edit of it for each prompt in `edits`, all from the same noise.

    Each step has two passes: the reference's, which keeps the image keys and values of `layers`, then the
    edits', which take them. So no edit touches the reference, and `batch_size` of them at a time changes
    memory only.

    Args:
        layers: where the edits take over keys and values, see `find_vital_layers`.
        inject_from, inject_until: for which part of the steps, in fractions of them; 0..1 is the paper's.
        photo: edit this picture, which `prompt` describes, instead of a generated one. Its latent is inverted
            (section 3.3) without guidance, and the reference then replays the inversion's own path.
        nudging: scale of the photograph's latent before the inversion (section 3.3), undone before decoding.
    """
    injecting = window(num_steps, inject_from, inject_until)
    levels = pipe.schedule(num_steps, width, height)
    ids = pipe.image_ids(1, width, height)
    keeping = Intervention(keep=frozenset(layers))
    chunks = [edits[i : i + batch_size] for i in range(0, len(edits), batch_size)]
    conds = [pipe.condition(chunk, guidance, true_cfg, negative_prompt) for chunk in chunks]

    if photo is None:
        cond = pipe.condition([prompt], guidance, true_cfg, negative_prompt)
        path, latent, nudging = None, pipe.noise([seed], width, height), 1.0
    else:
        # At guidance 1 the inversion is faithful; the negative pass is there for the edits to take from.
        cond = pipe.condition([prompt], 1.0, true_cfg, negative_prompt)
        path = _inverted(pipe, fit(photo, width, height), prompt, levels, ids, nudging, progress)
        latent = path[0]

    edited = [latent.expand(len(chunk), -1, -1) for chunk in chunks]
    with pipe.denoising() as model:
        pairs = list(zip(levels, levels[1:]))
        for index, (t, t_next) in enumerate(
            tqdm(pairs, desc="reference and edits", unit="step", disable=not progress)
        ):
            taking = NOTHING
            if index in injecting or path is None:
                source = euler_step(
                    model, latent, ids, cond, t, t_next, keeping if index in injecting else NOTHING
                )
                taking = Intervention(take=source.kept, take_negative=source.kept_negative)
            latent = source.latent if path is None else path[index + 1]
            for i, rows in enumerate(edited):
                row_ids = ids.expand(rows.shape[0], -1, -1)
                edited[i] = euler_step(model, rows, row_ids, conds[i], t, t_next, taking).latent
            # Before the next step's keys and values are made, else two steps' lie in memory at once.
            source = taking = None

    pictures = [
        picture
        for rows in (latent, *edited)
        for picture in pipe.decode(rows / nudging, width, height, watermark)
    ]
    return Edits(pictures[0], pictures[1:])


def _inverted(
    pipe: Pipeline, photo: Image.Image, prompt: str, levels, ids, nudging: float, progress: bool
) -> list:
    """The photograph's latents at each of the noise levels, noise first, each `nudging` times too large."""
    cond = pipe.condition([prompt], 1.0)
    latent = nudging * pipe.encode(photo)
    with pipe.denoising() as model:
        steps = invert(model, latent, ids, cond, levels)
        climbed = list(
            tqdm(steps, total=len(levels) - 1, desc="inversion", unit="step", disable=not progress)
        )
    return [*climbed[::-1], latent]
