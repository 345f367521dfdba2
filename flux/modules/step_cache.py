"""Steps of which only the first layer is computed, where it says that the others would say what they said."""

from collections.abc import Callable

import torch
from torch import Tensor


class StepCache:
    """What the layers after the first one added to the image stream at the last full step, for steps at
    which the first layer adds nearly what it added then (the rule of ParaAttention's first-block cache, after
    TeaCache, arXiv 2411.19108).

    Belongs to one batch on its way down. Only plain passes ask it: what an intervention keeps, takes, watches
    or bypasses is always computed.

    Args:
        threshold: how much the first layer's addition may differ, relative to what it was: the mean of the
            absolute difference over that of the absolute value, in the row where that is largest.
        total: adds up the sums that several processes found, each over its own image tokens.

    Attributes:
        full, reused: how many steps were which.
    """

    def __init__(self, threshold: float, total: Callable[[Tensor], Tensor] = lambda sums: sums):
        self.threshold, self.total, self.full, self.reused = threshold, total, 0, 0
        self._first: Tensor | None = None
        self._rest: Tensor | None = None

    def rest(self, first: Tensor) -> Tensor | None:
        """What the other layers are taken to add, "B I C", where the first one adds `first`; None: compute
        it, and `remember` it.
        """
        if self._first is None:
            return None
        both = torch.stack((first - self._first, self._first))
        change, before = self.total(both.abs().sum(dim=(2, 3), dtype=torch.float32))
        if (change / before).max().item() >= self.threshold:
            return None
        self.reused += 1
        return self._rest

    def remember(self, first: Tensor, rest: Tensor) -> None:
        self._first, self._rest = first, rest
        self.full += 1
