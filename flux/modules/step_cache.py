"""Reuse of what the later layers added at the last full step, while the first layer adds nearly the same."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class StepCache:
    """First-block cache (the rule of ParaAttention, after TeaCache, arXiv 2411.19108), for one sampling.

    A step whose first layer adds nearly what it added at the last full step computes no further layers: what
    these added then is added again.

    Args:
        threshold: Largest change of what the first layer adds, for the rest to be reused: mean absolute
            difference over mean absolute value, in the row where that is largest.
        total: Adds up sums over image tokens, where processes share these.

    Attributes:
        full: Number of steps that were computed whole.
        reused: Number of steps of which only the first layer was computed.
    """

    def __init__(self, threshold: float, total: Callable[[Tensor], Tensor] = lambda sums: sums):
        self.threshold, self.total, self.full, self.reused = threshold, total, 0, 0
        self._known: tuple[Tensor, Tensor] | None = None  # what the first layer and all others added

    def image_out(self, img: Tensor, layers: Iterator[Tensor]) -> Tensor:
        """The image stream out of the last layer, "B I C", computed or predicted.

        Args:
            img: The image stream into the first layer, "B I C".
            layers: Yields the image stream out of each layer. A layer is computed when it is asked for.
        """
        after_first = next(layers)
        first = after_first - img
        if self._known and self._change(first, self._known[0]) < self.threshold:
            self.reused += 1
            return after_first + self._known[1]
        last = after_first
        for last in layers:  # noqa: B007  (only the last one matters)
            pass
        self._known = first, last - after_first
        self.full += 1
        return last

    def _change(self, now: Tensor, before: Tensor) -> float:
        both = torch.stack((now - before, before))
        change, size = self.total(both.abs().sum(dim=(2, 3), dtype=torch.float32))
        return (change / size).max().item()
