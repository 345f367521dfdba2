"""What is done to a forward pass besides computing it: layers bypassed, keys and values handed out or taken
over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux.errors import InputError
from flux.math import KeysValues


@dataclass(frozen=True, eq=False)
class Intervention:
    """One forward pass's intervention. The empty one changes nothing, bit for bit.

    Layers are numbered over the whole model, double-stream blocks first (0..18 in FLUX.1), single-stream
    blocks after (19..56). To change it with the step, hand a sequence of them to `flux.sampling.denoise`, one
    for each step.

    Attributes:
        skip: layers that are bypassed, the streams passing on unchanged (Stable Flow, section 3.1): one set
            for the whole batch, or a tuple with one set for each row.
        keep: layers whose image keys and values are handed back.
        take: layers whose image keys and values are replaced by these ("R H I D" each, after QK-norm and
            rotary embedding; Stable Flow, section 3.2). The R rows must divide the batch; each serves batch /
            R rows in turn. Text keys and values, and all queries, stay the row's own.
        take_negative: the same for the negative pass of true classifier-free guidance; None: it takes what
            `take` says.
    """

    skip: frozenset[int] | tuple[frozenset[int], ...] = frozenset()
    keep: frozenset[int] = frozenset()
    take: Mapping[int, KeysValues] = field(default_factory=dict)
    take_negative: Mapping[int, KeysValues] | None = None

    def check(self, num_layers: int, batch: int) -> None:
        """Raises InputError for layers the model lacks and for rows that do not fit the batch."""
        check_layers(frozenset().union(*self.skip_rows(), self.keep, self.take), num_layers)
        if isinstance(self.skip, tuple) and len(self.skip) != batch:
            raise InputError(
                f"Got {len(self.skip)} sets of layers to bypass for {batch} rows: give one set for each row"
            )
        for layer, (k, v) in self.take.items():
            if k.shape != v.shape or batch % k.shape[0]:
                raise InputError(
                    f"Got keys {tuple(k.shape)} and values {tuple(v.shape)} for layer {layer}: their shapes must "
                    f"be equal and their rows must divide the batch of {batch}"
                )

    def skip_rows(self) -> tuple[frozenset[int], ...]:
        """The set of each row, or a single set that stands for all rows."""
        return self.skip if isinstance(self.skip, tuple) else (self.skip,)

    def of_negative_pass(self) -> "Intervention":
        return self if self.take_negative is None else replace(self, take=self.take_negative)

    def given(self, layer: int, batch: int) -> KeysValues | None:
        """The keys and values that `layer` takes over, brought to the batch's number of rows."""
        if layer not in self.take:
            return None
        k, v = self.take[layer]
        return rows_to_batch(k, batch), rows_to_batch(v, batch)


def rows_to_batch(x: Tensor, batch: int) -> Tensor:
    """R rows repeated batch / R times each, in order; a single row is expanded without a copy."""
    if x.shape[0] == 1:
        return x.expand(batch, *x.shape[1:])
    return x if x.shape[0] == batch else x.repeat_interleave(batch // x.shape[0], dim=0)


def check_layers(layers: Iterable[int], num_layers: int) -> None:
    """Raises InputError if one of `layers` is not a layer of a model with `num_layers`."""
    wrong = sorted(layer for layer in layers if not 0 <= layer < num_layers)
    if wrong:
        raise InputError(f"Got layers {wrong}, but this model numbers its layers 0..{num_layers - 1}")


def bypassed(rows: tuple[frozenset[int], ...], layer: int, device: torch.device) -> bool | Tensor:
    """Whether `layer` is bypassed: by all rows, by none, or, where they differ, by which ("B 1 1", bool)."""
    flags = [layer in row for row in rows]
    if all(flags) or not any(flags):
        return flags[0]
    return torch.tensor(flags, device=device)[:, None, None]


NOTHING = Intervention()
