"""Stands in for CUDA graphs, on any machine."""

from collections.abc import Callable

import torch

from flux.runtime.graphs import Answer


def tensors_of(answer: Answer) -> list[torch.Tensor]:
    """The velocity, and all that is kept."""
    velocity, recorded = answer
    kept = [x for parts in (*recorded.kept.values(), *recorded.context.values()) for x in parts]
    return [velocity, *kept]


def recomputed(compute: Callable[[], Answer]) -> Callable[[], Answer]:
    """Stand in for a graph: each call computes again, and overwrites the results of the call before."""
    results = compute()

    def replay() -> Answer:
        news = iter(tensors_of(compute()))
        for x in tensors_of(results):
            x.copy_(next(news))
        return results

    return replay
