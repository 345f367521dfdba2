"""CUDA graphs: a pass of few tokens is recorded once, and then launched as a whole.

A GPU may compute such a pass faster than Python can launch its kernels one by one: that of a small image, a
sparse step of an edit, or one GPU's share of an image that several make.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor

from flux.errors import warn
from flux.inputs import Inputs, Streams
from flux.intervention import NOTHING, Intervention, Recorded
from flux.math import Exchange
from flux.model import Flux
from flux.modules.step_cache import StepCache

MOST_TOKENS = 4096  # of all rows of a batch; with more, an H100 takes longer than Python
MOST_GRAPHS = 16  # that are kept at once

T = TypeVar("T")
Change = Callable[[Tensor], Tensor]
Answer = tuple[Tensor, Recorded]
"""The velocity, and what the pass recorded, as `Flux.observe` returns them."""
Recorder = Callable[[Callable[[], Answer]], Callable[[], Answer]]
"""Takes a function that computes a pass; returns one that launches the same kernels again."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of a pass, see `Flux.observe`."""

    inputs: Inputs
    intervention: Intervention
    mods: Sequence[Tensor]
    exchange: Exchange | None = None

    def map(self, change: Change) -> "Arguments":
        """The same with each tensor changed."""
        mods = [change(x) for x in self.mods]
        return Arguments(self.inputs.map(change), self.intervention.map(change), mods, self.exchange)

    def compute(self, model: Flux) -> Answer:
        """Compute the pass."""
        return model.observe(self.inputs, self.intervention, mods=self.mods, exchange=self.exchange)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the pass computes, of all rows. With an exchange, the largest share."""
        if self.exchange:
            return len(self.inputs.img) * self.exchange.most_tokens
        free = self.intervention.free
        left_out = 0 if free is None else len(free.others)
        return len(self.inputs.img) * (sum(self.inputs.counts) - left_out)

    @property
    def can_be_recorded(self) -> bool:
        """Whether the pass has few tokens, and an intervention that tends to come again."""
        change, img = self.intervention, self.inputs.img
        # A scan skips another layer in each image. Layers are watched in a single step.
        rare = change.skips_layers or change.watch
        # A dose may have another weight in each step. Those of single tokens are tensors.
        weighted = any(not isinstance(x, Tensor) for x in change.inject_weights.values())
        # Passes on two streams would overwrite each other's inputs.
        other_stream = img.is_cuda and torch.cuda.current_stream() != torch.cuda.default_stream()
        return not (rare or weighted or other_stream) and self.num_tokens <= MOST_TOKENS

    @property
    def kind(self) -> tuple:
        """Equal for passes that run the same kernels. Only the numbers in their tensors differ."""
        inputs, change, free = self.inputs, self.intervention, self.intervention.free
        first_kv = () if free is None else next(iter(free.kv.values()), ())  # all layers are alike
        return (
            _shapes(inputs.tensors),
            inputs.condition.context_strength,
            self.mods[0].shape,
            *(change.keep, change.keep_queries, change.keep_context, change.hide_context),
            *(_shapes(change.inject), _shapes(change.inject_context), _shapes(change.inject_weights)),
            free and (len(free.computed), len(free.others), _shapes(dict(enumerate(first_kv)))),
            self.exchange and self.exchange.kind,
        )


def _shapes(named: Mapping[Any, Any]) -> tuple:
    """The shape and dtype of each tensor, or of those of each layer, with the names or layers."""
    several = {name: x if isinstance(x, tuple) else (x,) for name, x in named.items()}
    return tuple((name, *(x is not None and (x.shape, x.dtype) for x in xs)) for name, xs in several.items())


class Places:
    """Tensors that the kernels of recorded passes read their inputs from.

    All passes share them, since each one fills its own just before it is launched.
    """

    def __init__(self):
        self.tensors: dict[tuple, list[Tensor]] = {}

    def filling(self) -> Change:
        """A function that copies a pass's tensors, one after the other, each to a place of its own.

        It returns the place. The same shapes in the same order go to the same places.
        """
        taken: Counter[tuple] = Counter()

        def fill(x: Tensor) -> Tensor:
            shape = x.shape, x.dtype
            places = self.tensors.setdefault(shape, [])
            if taken[shape] == len(places):
                places.append(torch.empty_like(x))
            taken[shape] += 1
            return places[taken[shape] - 1].copy_(x)

        return fill


class GraphRecorder:
    """Records CUDA graphs that share the memory between their inputs and results."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        """Record the kernels of `function`.

        Returns:
            A function that launches them again. The next call of any function from this recorder may
            overwrite what it returns.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: NCCL's do.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = function()

        def replay() -> T:
            graph.replay()
            return result

        return replay


class GraphedModel:
    """A transformer that records its passes of few tokens, used like the one that it wraps.

    Args:
        model: The transformer, whose weights lie on the GPU.
        record: Records a pass. If None, a `GraphRecorder`.
    """

    def __init__(self, model: Flux, record: Recorder | None = None):
        self.model, self.record = model, record or GraphRecorder()
        self.streams, self.modulations = model.streams, model.modulations
        self.records = True  # until a pass turns out not to be recordable
        self.pointers: list[int] = []  # to the weights, which graphs read where they were
        self.places = Places()
        self.passes: dict[tuple, Callable[[], Answer]] = {}
        self.used: set[tuple] = set()
        # At the end of a process too: NCCL waits there until no graph needs it.
        finalize(self, self.passes.clear)

    def begin(self) -> None:
        """Begin a run: passes of earlier runs may now be forgotten, and are if the weights have moved."""
        self.used.clear()
        pointers = [x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers())]
        if pointers != self.pointers:
            self.forget()
        self.pointers = pointers

    def forget(self) -> None:
        """Forget all passes."""
        self.passes.clear()
        self.places = Places()

    def observe(
        self,
        inputs: Inputs,
        intervention: Intervention = NOTHING,
        *,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
        exchange: Exchange | None = None,
    ) -> Answer:
        """See `Flux.observe`."""
        if self.records and mods is not None and start is None and cache is None:
            given = Arguments(inputs, intervention, mods, exchange)
            if given.can_be_recorded and self._has_room(kind := given.kind):
                return self._recorded(given, kind)
        return self.model.observe(
            inputs, intervention, start=start, mods=mods, cache=cache, exchange=exchange
        )

    def _has_room(self, kind: tuple) -> bool:
        """Whether such a pass is recorded, or may be. One of an earlier run may be forgotten for it."""
        if kind not in self.passes and len(self.passes) >= MOST_GRAPHS:
            unused = next((known for known in self.passes if known not in self.used), None)
            if unused is None:
                return False
            del self.passes[unused]
        self.used.add(kind)
        return True

    def _recorded(self, given: Arguments, kind: tuple) -> Answer:
        """Launch the recorded pass. If there is none yet, compute the pass and record it."""
        placed = given.map(self.places.filling())
        if kind in self.passes:
            velocity, recorded = self.passes[kind]()
            return velocity.clone(), recorded.map(torch.clone)
        compute = partial(placed.compute, self.model)
        answer = compute()  # compiles kernels, which cannot be recorded
        try:
            self.passes[kind] = self.record(compute)
        except RuntimeError as error:  # some layer waits for the GPU, or memory ran out
            reason = str(error).partition("\n")[0]
            warn(f"Passes cannot be CUDA graphs ({reason}): kernels are launched one by one")
            self.records = False
            self.forget()
        return answer
