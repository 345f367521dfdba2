"""Labels of images, read from the renderer's rows: the targets of the vision models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.scenes.compose import FIRST_THING, SLOT_WIDTH, THING_SLOTS
from training.scenes.vocabulary import COLOUR_NAMES, OBJECTS, PLACES, TIME_NAMES

NUM_OBJECTS, NUM_COLOURS, NUM_PLACES, NUM_TIMES = (
    len(OBJECTS),
    len(COLOUR_NAMES),
    len(PLACES),
    len(TIME_NAMES),
)
NUM_COUNTS = THING_SLOTS


@dataclass
class Labels:
    """The targets of a batch.

    Attributes:
        objects: Which objects are shown, worn hats too, `B 91` of 0 and 1.
        worn: Which hats are worn, `B 91` of 0 and 1.
        colours: Which colours the caption gives to objects, `B 11` of 0 and 1.
        place: The index of the place, `B`.
        time: The index of the time of day, `B`.
        count: The number of subjects minus one, `B`.
        x: Where each object stands, `B 91`. Meaningful where `objects` is 1.
    """

    objects: Tensor
    worn: Tensor
    colours: Tensor
    place: Tensor
    time: Tensor
    count: Tensor
    x: Tensor


def things_of(rows: Tensor) -> Tensor:
    """Return the subjects of rows, `B slots 6`: sprite (-1 if none), x, foot, size, colour, hat."""
    return rows[:, FIRST_THING:].unflatten(1, (THING_SLOTS, SLOT_WIDTH))


def labels_of(rows: Tensor, device: torch.device | str = "cpu") -> Labels:
    """Read the labels of rows `B COLUMNS`."""
    rows = rows.to(device)
    batch = torch.arange(len(rows), device=rows.device)
    objects, worn, x = (torch.zeros(len(rows), NUM_OBJECTS, device=rows.device) for _ in range(3))
    colours = torch.zeros(len(rows), NUM_COLOURS, device=rows.device)
    things = things_of(rows)
    for slot in range(THING_SLOTS):
        sprite, colour, hat = (things[:, slot, column].long() for column in (0, 4, 5))
        there, coloured, hatted = batch[sprite >= 0], batch[colour >= 0], batch[hat >= 0]
        objects[there, sprite[there]] = 1
        x[there, sprite[there]] = things[there, slot, 1]
        colours[coloured, colour[coloured]] = 1
        objects[hatted, hat[hatted]] = 1
        worn[hatted, hat[hatted]] = 1
        x[hatted, hat[hatted]] = things[hatted, slot, 1]
    count = (things[:, :, 0] >= 0).sum(1) - 1
    return Labels(objects, worn, colours, rows[:, 0].long(), rows[:, 1].long(), count, x)
