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
            None in place of keys or of values: the row's own are used.
        take_negative: the same for the negative pass of true classifier-free guidance; None: it takes what
            `take` says.
        weights: what is taken, of each layer, 0..1: own + weight * (taken - own). A tensor has a weight for
            each image token, "R I", its rows as in `take`. A layer not named here takes all, and the
            projections of its own image keys and values are then not computed.
        watch: layers whose queries and keys of all tokens are handed back.
        scale: what is left of a skipped layer's output: 0, it is bypassed and, where all rows skip it, not
            even computed; 1, nothing happens.
    """

    skip: frozenset[int] | tuple[frozenset[int], ...] = frozenset()
    keep: frozenset[int] = frozenset()
    take: Mapping[int, KeysValues] = field(default_factory=dict)
    take_negative: Mapping[int, KeysValues] | None = None
    watch: frozenset[int] = frozenset()
    scale: float = 0.0
    weights: Mapping[int, float | Tensor] = field(default_factory=dict)

    def check(self, num_layers: int, batch: int, num_img: int) -> None:
        """Raises InputError for layers that the model lacks, and for rows or image tokens that do not fit."""
        check_layers(frozenset().union(*self.skip_rows(), self.keep, self.take, self.watch), num_layers)
        if isinstance(self.skip, tuple) and len(self.skip) != batch:
            raise InputError(
                f"Got {len(self.skip)} sets of layers to bypass for a batch of {batch}: give one for each row"
            )
        for layer, pair in self.take.items():
            shapes = {tuple(x.shape) for x in pair if x is not None}
            if len(shapes) != 1 or any(batch % shape[0] or shape[2] != num_img for shape in shapes):
                raise InputError(
                    f"Got keys and values of shapes {sorted(shapes)} for layer {layer}: their shapes must be "
                    f"equal, their rows divide the batch of {batch}, their tokens be {num_img}"
                )
        for layer, weight in self.weights.items():
            if isinstance(weight, Tensor):
                if weight.ndim != 2 or batch % weight.shape[0] or weight.shape[1] != num_img:
                    raise InputError(
                        f"Got weights of shape {tuple(weight.shape)} for layer {layer}: their rows must "
                        f"divide the batch of {batch}, their tokens be {num_img}"
                    )
            elif not 0 <= weight <= 1:
                raise InputError(f"Got the weight {weight} for layer {layer}: expected 0..1")

    def skip_rows(self) -> tuple[frozenset[int], ...]:
        """The set of each row, or a single set that stands for all rows."""
        return self.skip if isinstance(self.skip, tuple) else (self.skip,)

    def of_negative_pass(self) -> "Intervention":
        """What the negative pass of true guidance does: nothing is watched there."""
        take = self.take if self.take_negative is None else self.take_negative
        return replace(self, take=take, watch=frozenset())

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to the pass."""
        return not (self.keep or self.take or self.watch or any(self.skip_rows()))

    def looks_into(self, layer: int) -> bool:
        return layer in self.keep or layer in self.watch

    def bypass(self, layer: int, device: torch.device) -> "Bypass":
        flags = [layer in row for row in self.skip_rows()]
        alike = all(flags) or not any(flags)
        return Bypass(flags[0] if alike else torch.tensor(flags, device=device)[:, None, None], self.scale)

    def given(self, layer: int, batch: int) -> tuple[KeysValues | None, Tensor | None]:
        """The keys and values that `layer` takes over, brought to the batch's number of rows, and their
        weight, "B or 1, 1, I or 1, 1"; None: all of them is taken.
        """
        if layer not in self.take:
            return None, None
        pair = tuple(None if x is None else rows_to_batch(x, batch) for x in self.take[layer])
        weight, like = self.weights.get(layer, 1.0), next(x for x in pair if x is not None)
        if isinstance(weight, Tensor):
            weight = rows_to_batch(weight, batch).to(like)[:, None, :, None]
        else:
            # A tensor, for compiled blocks would be compiled anew for each number.
            weight = None if weight == 1 else like.new_full((1, 1, 1, 1), weight)
        return pair, weight

    def of_both_passes(self) -> "Intervention":
        """For a batch with the rows of the pass itself first, then those of the negative pass."""
        negative = self.take if self.take_negative is None else self.take_negative
        if negative.keys() != self.take.keys():
            raise ValueError("Both passes must take in the same layers to be one batch")
        skip = 2 * self.skip if isinstance(self.skip, tuple) else self.skip
        take = {
            layer: tuple(None if x is None else torch.cat((x, y)) for x, y in zip(pair, negative[layer]))
            for layer, pair in self.take.items()
        }
        weights = {
            layer: weight.repeat(2, 1) if isinstance(weight, Tensor) else weight
            for layer, weight in self.weights.items()
        }
        return replace(self, skip=skip, take=take, take_negative=None, weights=weights)


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


@dataclass(frozen=True, eq=False)
class Findings:
    """What a forward pass hands back beside its velocity, by layer.

    Attributes:
        kept: image keys and values ("B H I D" each, after QK-norm and rotary embedding).
        watched: queries and keys of all tokens, text first ("B H N D" each, likewise).
    """

    kept: dict[int, KeysValues] = field(default_factory=dict)
    watched: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(
        self, intervention: Intervention, layer: int, num_txt: int, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Takes what the intervention wants of a layer's queries, keys and values."""
        if layer in intervention.keep:
            # Copies: a part of a projection would keep the whole of it in memory.
            image = (part[:, :, num_txt:].transpose(1, 2) for part in (k, v))
            self.kept[layer] = tuple(
                part.clone(memory_format=torch.contiguous_format).transpose(1, 2) for part in image
            )
        if layer in intervention.watch:
            self.watched[layer] = (q, k)


@dataclass(frozen=True, eq=False)
class Bypass:
    """What one layer's bypass makes of the streams before and after it.

    Attributes:
        rows: whether all rows skip the layer, none, or, where they differ, which do ("B 1 1", bool).
        scale: see `Intervention`.
    """

    rows: bool | Tensor
    scale: float

    @property
    def whole(self) -> bool:
        """Whether the layer need not be computed at all."""
        return self.rows is True and self.scale == 0

    def of(self, before: Tensor, after: Tensor) -> Tensor:
        """The stream that passes on."""
        if self.rows is False:
            return after
        skipped = before if self.scale == 0 else torch.lerp(before, after, self.scale)
        return skipped if self.rows is True else torch.where(self.rows, skipped, after)


NOTHING = Intervention()
