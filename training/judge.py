"""The measuring net as a judge of edits: does a picture show what was asked for, and where is its subject?

What is asked for is a plain dictionary, which a benchmark's file can hold:

    objects, gone   names of objects that are to be there, and not to be there
    worn            the hat that is to be worn
    colour, place, time
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from flux.errors import InputError
from flux.images.io import to_tensor
from training.evaluate import look
from training.loop.nets import NANO
from training.scenes.compose import Content
from training.scenes.vocabulary import COLOUR_NAMES, INDEX, PLACE_INDEX, TIME_NAMES
from training.stages.vision import MeasuringNet, Seen

# The logit from which on an object is there. One of ninety is seldom there, so the net is slow to name the
# second of two: on rendered edits this errs least, on pictures after an edit and before it alike.
THERE = -3.0


def asked(edit: str, before: Content, after: Content) -> dict:
    """What `edit` (one of `training.scenes.compose.EDITS`) asks for; the subject is to be there always."""
    asked = {"objects": [subject.name for subject in after.subjects]}
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


def shows(seen: Seen, row: int, asked: dict) -> bool:
    """Whether picture number `row` shows all that was asked for."""
    there, colours = seen.objects[row] > THERE, seen.colours[row]
    good = all(there[INDEX[name]] for name in asked["objects"])
    good = good and not any(there[INDEX[name]] for name in asked["gone"])
    if "worn" in asked:
        good = good and seen.worn[row, INDEX[asked["worn"]]] > 0
    if "colour" in asked:
        colour = COLOUR_NAMES.index(asked["colour"])
        # Where no colour is worth a word, one of the negative numbers is still the largest.
        good = good and colours.argmax() == colour and colours[colour] > 0
    if "place" in asked:
        good = good and seen.place[row].argmax() == PLACE_INDEX[asked["place"]]
    if "time" in asked:
        good = good and seen.time[row].argmax() == TIME_NAMES.index(asked["time"])
    return bool(good)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Of one edit.

    Attributes:
        success: whether it shows all that was asked for.
        overlap: of the subjects before and after.
        mask: what it may have changed, booleans "H W", where nothing else says so.
    """

    success: bool
    overlap: float
    mask: np.ndarray


class Judge:
    """A measuring net, ready to look at pictures."""

    def __init__(self, net: MeasuringNet, device: str | torch.device = "cpu"):
        self.net, self.device = net.float().to(device).eval().requires_grad_(False), device

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Judge":
        """The net that the stage "measuring" wrote, measuring.pt.

        Raises:
            InputError: no such file, or none of a measuring net.
        """
        if not Path(path).is_file():
            raise InputError(
                f"Got the judge {path}, which is not there: python -m training measuring makes measuring.pt"
            )
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            net = MeasuringNet(replace(NANO, measuring_width=len(weights["first.weight"])))
            net.load_state_dict(weights)
        except Exception as error:
            raise InputError(f"Got the judge {path}, which holds no measuring net: {error}") from error
        return cls(net, device)

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> tuple[Seen, np.ndarray]:
        """What pictures of one size show, and where their subjects are, booleans "B H W"."""
        images = torch.stack([to_tensor(picture) for picture in pictures]).to(self.device)
        seen, masks = look(self.net, (images + 1) / 2)
        # At once, since every look at a single number waits for the device.
        return Seen(*(value.cpu() for value in vars(seen).values())), masks[:, 0].cpu().numpy()

    def of(
        self, before: Sequence[Image.Image], after: Sequence[Image.Image], asked: Sequence[dict]
    ) -> list[Verdict]:
        """Of each edit, from the picture before it."""
        (_, old), (seen, new) = self.see(before), self.see(after)
        return [
            Verdict(shows(seen, row, each), overlap(*masks), may_change(*masks, each))
            for row, (each, *masks) in enumerate(zip(asked, old, new))
        ]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def may_change(old: np.ndarray, new: np.ndarray, asked: dict) -> np.ndarray:
    """What an edit with subjects there before and after may change: they and 7 pixels around them, or, if
    the scene is to be another, all but what is subject in both.
    """
    if "place" in asked or "time" in asked:
        return ~(old & new)
    around = torch.from_numpy(old | new).float()[None]
    for kernel, padding in (((15, 1), (7, 0)), ((1, 15), (0, 7))):  # one after the other: much faster
        around = F.max_pool2d(around, kernel, stride=1, padding=padding)
    return around[0].numpy() > 0
