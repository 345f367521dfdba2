"""Judges edits with the measuring model: does an image show what was asked for, and where are its subjects?

What was asked for is a plain dictionary, so that a benchmark's file can hold it:

    objects, gone          names of objects that must be there, and that must not
    worn                   the hat that must be worn
    colour, place, time    the colour of the subject, the place, the time of day
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux.errors import InputError
from flux.evaluate.judge import Verdict
from flux.images.io import to_tensor
from flux.weights.load import read_weights
from training.loop.models import NANO
from training.scenes.content import Content
from training.scenes.vocabulary import COLOUR_NAMES, INDEX, PLACE_INDEX, TIME_NAMES
from training.stages.vision import MeasuringModel, Recognition, recognize

# An object counts as shown from this logit on. Each of ninety objects is rarely there, so the model is slow
# to name the second of two. On rendered edits this threshold errs least, after an edit and before it alike.
SHOWN_FROM = -3.0
SHIPPED = Path(__file__).with_name("judge.safetensors")


def asked_for(edit: str, before: Content, after: Content) -> dict[str, Any]:
    """Say what an edit asks for. The subjects must always be there.

    Args:
        edit: One of `training.scenes.edits.EDITS`.
        before: The content before the edit.
        after: The content after it.
    """
    asked: dict[str, Any] = {"objects": [subject.name for subject in after.subjects]}
    kept = set(asked["objects"])
    asked["gone"] = [subject.name for subject in before.subjects if subject.name not in kept]
    subject = after.subjects[0]
    if edit == "hat":
        asked["worn"] = subject.hat
    elif edit == "recolour":
        asked["colour"] = subject.colour
    elif edit in ("background", "time"):
        name = {"background": "place", "time": "time"}[edit]
        asked[name] = getattr(after, name)
    return asked


def shows(recognition: Recognition, row: int, asked: Mapping[str, Any]) -> bool:
    """Whether image number `row` shows everything that was asked for."""
    shown, colours = recognition.objects[row] > SHOWN_FROM, recognition.colours[row]
    good = all(shown[INDEX[name]] for name in asked["objects"])
    good = good and not any(shown[INDEX[name]] for name in asked["gone"])
    if "worn" in asked:
        good = good and recognition.worn[row, INDEX[asked["worn"]]] > 0
    if "colour" in asked:
        colour = COLOUR_NAMES.index(asked["colour"])
        # If no colour is recognized, one of the negative logits is still the largest.
        good = good and colours.argmax() == colour and colours[colour] > 0
    if "place" in asked:
        good = good and recognition.place[row].argmax() == PLACE_INDEX[asked["place"]]
    if "time" in asked:
        good = good and recognition.time[row].argmax() == TIME_NAMES.index(asked["time"])
    return bool(good)


class MeasuringJudge:
    """Judges edits by what the measuring model recognizes in them. It is a `flux.evaluate.judge.Judge`."""

    def __init__(self, model: MeasuringModel, device: str | torch.device = "cpu"):
        self.model, self.device = model.float().to(device).eval().requires_grad_(False), device

    @classmethod
    def load(cls, path: str | Path = SHIPPED, device: str | torch.device = "cpu") -> "MeasuringJudge":
        """Load a file that the stage "measuring" writes: measuring.pt, or the smaller judge.safetensors.

        Raises:
            InputError: the file is missing, or holds no measuring model.
        """
        if not Path(path).is_file():
            raise InputError(
                f"Got the judge {path}, which is not there: python -m training measuring makes measuring.pt"
            )
        try:
            weights = _read(Path(path))
            model = MeasuringModel(replace(NANO, measuring_width=len(weights["first.weight"])))
            model.load_state_dict(weights)
        except Exception as error:
            raise InputError(f"Got the judge {path}, which holds no measuring model: {error}") from error
        return cls(model, device)

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> tuple[Recognition, np.ndarray]:
        """Recognize what images of one size show, and where their subjects are, booleans `B H W`."""
        tensors = torch.stack([to_tensor(image) for image in images]).to(self.device)
        recognition, masks = recognize(self.model, (tensors + 1) / 2)
        # All at once, since reading a single number waits for the device.
        return Recognition(*(value.cpu() for value in vars(recognition).values())), masks[:, 0].cpu().numpy()

    def judge(
        self,
        before: Sequence[Image.Image],
        after: Sequence[Image.Image],
        asked: Sequence[Mapping[str, Any]],
    ) -> list[Verdict]:
        """Judge each edit by the image before it, the edit itself, and what was asked for."""
        (_, old), (recognition, new) = self.see(before), self.see(after)
        return [
            Verdict(
                shows(recognition, row, each),
                overlap(old[row], new[row]),
                changeable(old[row], new[row], each),
            )
            for row, each in enumerate(asked)
        ]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path, "cpu", torch.float32)
    return torch.load(path, map_location="cpu", weights_only=True)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def changeable(old: np.ndarray, new: np.ndarray, asked: Mapping[str, Any]) -> np.ndarray:
    """Find what an edit may change, from the masks of the subjects before and after, booleans `H W`.

    That is the subjects and 7 pixels around them. If another place or time was asked for, it is everything
    but what belongs to a subject both before and after.
    """
    if "place" in asked or "time" in asked:
        return ~(old & new)
    around = torch.from_numpy(old | new).float()[None]
    for kernel, padding in (((15, 1), (7, 0)), ((1, 15), (0, 7))):  # one after the other: much faster
        around = F.max_pool2d(around, kernel, stride=1, padding=padding)
    return around[0].numpy() > 0
