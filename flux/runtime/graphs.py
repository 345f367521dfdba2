"""CUDA graphs: a plain pass of few tokens is recorded once, and then launched as a whole.

A GPU may compute such a pass faster than Python can launch its kernels one by one: that of a small image, or
one GPU's share of an image that several make.
"""

from collections.abc import Callable, Sequence
from weakref import finalize

import torch
from torch import Tensor, nn

from flux.errors import warn
from flux.inputs import Inputs, Streams
from flux.intervention import NOTHING, Intervention, Recorded
from flux.model import VelocityModel
from flux.modules.step_cache import StepCache

MOST_TOKENS = 2560  # on one GPU, of all rows of a batch; with more, an H100 takes longer than Python
MOST_GRAPHS = 2  # that are kept at once; each holds the memory of its pass

Answer = Callable[[], Tensor]
"""Computes a velocity from inputs that stay at their places in memory."""


def has_few_tokens(inputs: Inputs, num_gpus: int = 1) -> bool:
    """Whether a pass that so many GPUs share is one of few tokens."""
    return len(inputs.img) * sum(inputs.counts) <= MOST_TOKENS * num_gpus


def record_graph(answer: Answer) -> Answer:
    """Record the kernels of `answer` as a CUDA graph.

    Returns:
        A function that launches them again. What it returns is overwritten by its next call.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: NCCL's do.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        velocity = answer()

    def replay() -> Tensor:
        graph.replay()
        return velocity

    return replay


class RecordedPass:
    """A plain pass that is recorded: the same kernels for other inputs of the same shapes.

    Args:
        model: The transformer.
        inputs: The first inputs.
        mods: Their modulations, see `Flux.modulations`.

    Attributes:
        replay: Computes the velocity of what is in its places, at first without a recording.
        first: The velocity of the first inputs, "B I channels".
    """

    def __init__(self, model: VelocityModel, inputs: Inputs, mods: Sequence[Tensor]):
        self.inputs, self.mods = inputs.map(torch.clone), [x.clone() for x in mods]
        self.replay: Answer = lambda: model.observe(self.inputs, mods=self.mods)[0]
        self.first = self.replay()  # compiles kernels, which cannot be recorded

    def __call__(self, inputs: Inputs, mods: Sequence[Tensor]) -> Tensor:
        """The velocity of other inputs, "B I channels"."""
        places = [*self.inputs.tensors.values(), *self.mods]
        for place, x in zip(places, [*inputs.tensors.values(), *mods], strict=True):
            place.copy_(x)
        return self.replay().clone()


class GraphedModel:
    """A transformer that records its plain passes of few tokens, used like the one that it wraps.

    Args:
        model: The transformer.
        weights: The module with its weights, which lie on the GPU.
        num_gpus: Number of GPUs that share the tokens of a pass.
        record: Records a pass.
    """

    def __init__(
        self,
        model: VelocityModel,
        weights: nn.Module,
        num_gpus: int = 1,
        record: Callable[[Answer], Answer] = record_graph,
    ):
        self.model, self.weights, self.num_gpus, self.record = model, weights, num_gpus, record
        self.streams, self.modulations = model.streams, model.modulations
        self.records = True  # until a pass turns out not to be recordable
        self.places: list[int] = []
        self.passes: dict[tuple, RecordedPass] = {}
        # At the end of a process too: NCCL waits there until no graph needs it.
        finalize(self, self.passes.clear)

    def check_weights(self) -> None:
        """Forget all passes if the weights are no longer where these read them."""
        tensors = [*self.weights.parameters(), *self.weights.buffers()]
        places = [x.data_ptr() for x in tensors]
        if places != self.places:
            self.passes.clear()
        self.places = places

    def observe(
        self,
        inputs: Inputs,
        intervention: Intervention = NOTHING,
        *,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Recorded]:
        """See `Flux.observe`."""
        plain = intervention.is_plain and start is None and cache is None
        if self.records and plain and mods is not None and has_few_tokens(inputs, self.num_gpus):
            return self._recorded(inputs, mods), Recorded()
        return self.model.observe(inputs, intervention, start=start, mods=mods, cache=cache)

    def _recorded(self, inputs: Inputs, mods: Sequence[Tensor]) -> Tensor:
        """The velocity by a recorded pass, which is recorded if there is none yet."""
        tensors = inputs.tensors | {str(layer): x for layer, x in enumerate(mods)}
        shapes = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        # Passes on two streams would overwrite each other's inputs.
        stream = torch.cuda.current_stream().stream_id if inputs.img.is_cuda else None
        key = shapes, inputs.condition.context_strength, stream
        known = self.passes.pop(key, None)
        if known is not None:
            self.passes[key] = known  # the latest one comes last
            return known(inputs, mods)
        if len(self.passes) >= MOST_GRAPHS:
            del self.passes[next(iter(self.passes))]
        new = RecordedPass(self.model, inputs, mods)
        try:
            new.replay = self.record(new.replay)
            self.passes[key] = new
        except RuntimeError as error:  # some layer waits for the GPU, or memory ran out
            reason = str(error).partition("\n")[0]
            warn(f"Passes cannot be CUDA graphs ({reason}): kernels are launched one by one")
            self.records = False
            self.passes.clear()
        return new.first
