"""Sequence parallelism: one image on several GPUs, each process of torchrun holding a share of the tokens.

In each layer, the queries of a process attend to the keys and values of all tokens, text and image, which the
processes gather.

    torchrun --nproc_per_node 2 demo_4_edit.py edit.json --parallel 2

All else, from the noise to the pixels, is computed alike in each process.
"""

import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import permutations, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from flux.errors import InputError, launched
from flux.inputs import Inputs, Streams
from flux.intervention import NOTHING, FreeTokens, Intervention, Recorded
from flux.math import KeysValues, TokenCounts, choose_tokens
from flux.model import Flux
from flux.modules.step_cache import StepCache
from flux.runtime.graphs import GraphedModel


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share the tokens of an image.

    Attributes:
        rank: Number of this process.
        count: Number of processes.
        device: Device of this process. If None, the one of the settings.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    def shard(self, tokens: Tensor) -> Tensor:
        """This process's slice of the tokens, "B n ...". If uneven, the first processes get one extra."""
        return tokens.tensor_split(self.count, dim=1)[self.rank]

    def sizes(self, *runs: int) -> tuple[int, ...]:
        """The number of tokens that each process holds of runs of such lengths, each sharded by itself."""
        return tuple(
            sum(run // self.count + (rank < run % self.count) for run in runs) for rank in range(self.count)
        )

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, which overwrites it."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, dim: int, *runs: int) -> Tensor:
        """All tokens, from each process's shards `x` of runs of such lengths, in turn along `dim`."""
        places = [self.shard(run[None])[0] for run in torch.arange(sum(runs), device=x.device).split(runs)]
        shape = [*x.shape[:dim], sum(runs), *x.shape[dim + 1 :]]
        # A sum with zeros is exact and, unlike an all-gather, takes shards of different sizes.
        return self.total(x.new_zeros(shape).index_copy_(dim, torch.cat(places), x))


ALONE = ProcessGroup()


def join(parallel: int, device: str, longest_wait: timedelta | None = None) -> ProcessGroup:
    """Join the other processes that torchrun started.

    Args:
        parallel: Number of processes that the settings ask for.
        device: Device that the settings ask for.
        longest_wait: How long a process may wait for another one. If None, as long as torch lets it: ten
            minutes on GPUs, half an hour elsewhere.

    Returns:
        `ALONE` if there is a single process.

    Raises:
        InputError: There are not `parallel` processes of torchrun, there are fewer GPUs, or the device is a
            particular one.
    """
    _check_launch(parallel, device)
    if parallel == 1:
        return ALONE
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        dist.init_process_group(backend="gloo", timeout=longest_wait)
        return ProcessGroup(dist.get_rank(), parallel, torch.device("cpu"))
    gpus, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus < wanted:
        raise InputError(f"Got {wanted} processes, but this machine has {gpus} CUDA GPUs: start fewer")
    gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(gpu)
    # Makes NCCL leave copies to the GPUs' copy engines where it can. Its kernels would wait for a matmul to
    # end that they are to overlap with.
    os.environ.setdefault("NCCL_CTA_POLICY", "2")
    dist.init_process_group(backend="nccl", device_id=gpu, timeout=longest_wait)
    return ProcessGroup(dist.get_rank(), parallel, gpu)


def _check_launch(parallel: int, device: str) -> None:
    """Raise an `InputError` unless torchrun has started so many processes, each on a device of its own."""
    started = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if started == 1 < parallel:
        command = shlex.join(("torchrun", "--nproc_per_node", str(parallel), *sys.argv))
        raise InputError(f"Got parallel {parallel}, but this is a single process: start it with {command}")
    if started != parallel:
        raise InputError(
            f"Got parallel {parallel}, but torchrun started {started} processes: make them equal"
        )
    if parallel > 1 and device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"Got device {device!r} with parallel {parallel}, where each process has its own: "
            "give cuda, cpu or auto"
        )


WIDE = torch.complex128  # the widest dtype: the fewer numbers are copied, the faster


@dataclass(frozen=True, eq=False)
class AllGatherKV:
    """A `flux.math.Exchange` by all-gather.

    The tokens come in the order of the processes. Attention gives the same in any order.

    Attributes:
        group: The processes.
        tokens: Number of tokens that each process holds.
        most_tokens: The largest number of these that a process computes.
        num_context: Number of context tokens of all processes.
        visible: Places of all other tokens among those gathered. If None, no layer hides the context.
    """

    group: ProcessGroup
    tokens: tuple[int, ...]
    most_tokens: int
    num_context: int = 0
    visible: Tensor | None = None

    @property
    def kind(self) -> tuple:
        """See `flux.math.Exchange.kind`."""
        return self.tokens, self.num_context

    def mean_of_context(self, x: Tensor) -> Tensor:
        """See `flux.math.Exchange.mean_of_context`."""
        total = self.group.total(x.sum(dim=2, keepdim=True, dtype=torch.float32))
        return (total / self.num_context).to(x)

    def without_context(self, x: Tensor) -> Tensor:
        """See `flux.math.Exchange.without_context`."""
        return x if self.visible is None else choose_tokens(x, self.visible)

    def __call__(self, k: Tensor, v: Tensor) -> Callable[[], KeysValues]:
        """Start to gather keys and values, "B H n D"; return a function that waits for all, "B H N D"."""
        (batch, heads, own, size), most = k.shape, max(self.tokens)
        # Tokens first: shards of equal size are then, one after another, those of all processes.
        shape = self.group.count * most, batch, 2, heads, size
        # A compiler knows no asynchronous work, and none of the shared memory.
        asynchronous = not torch.compiler.is_compiling()
        gathered = peer_memory(k, shape) if asynchronous and k.is_cuda else k.new_empty(shape)
        sent = gathered[self.group.rank * most :][:most]
        for part, x in enumerate((k, v)):
            place, x = sent[:own, :, part], x.permute(2, 0, 1, 3)
            if asynchronous and size * k.itemsize % WIDE.itemsize == 0:
                place, x = place.view(WIDE), x.view(WIDE)
            place.copy_(x)
        work = dist.all_gather_into_tensor(gathered, sent, async_op=asynchronous)

        def wait() -> KeysValues:
            if asynchronous and work is not None:
                work.wait()
            every = gathered
            if min(self.tokens) < most:
                every = torch.cat([shard[:n] for shard, n in zip(gathered.split(most), self.tokens)])
            k, v = (x.permute(1, 2, 0, 3) for x in every.unbind(dim=2))
            return k, v

        return wait


def peer_memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor that the copy engines of other GPUs write to, if these GPUs allow it.

    It is the same memory each time: a layer's keys and values have been read before the next layer's arrive.
    """
    if not gpus_are_peers():
        return like.new_empty(shape)
    size = math.prod(shape) * like.itemsize
    return shared_memory(1 << (size - 1).bit_length(), like.device)[:size].view(like.dtype).view(shape)


@cache
def gpus_are_peers() -> bool:
    """Whether each GPU of the group can write to each other's memory, by NVIDIA's library."""
    gpus = range(int(os.environ["LOCAL_WORLD_SIZE"]))
    one_machine = len(gpus) == dist.get_world_size() and not torch.version.hip
    return one_machine and all(torch.cuda.can_device_access_peer(a, b) for a, b in permutations(gpus, 2))


@cache
@torch.inference_mode(False)
def shared_memory(size: int, device: torch.device) -> Tensor:
    """So many bytes on each GPU, known to all of them."""
    # Not at the top: not every build of torch has it.
    import torch.distributed._symmetric_memory as symm_mem

    symm_mem.set_backend("NCCL")
    memory = symm_mem.empty(size, dtype=torch.uint8, device=device)
    symm_mem.rendezvous(memory, dist.group.WORLD)  # pyright: ignore  (None only before init_process_group)
    return memory


class SequenceParallelFlux:
    """A transformer that computes this process's share of the tokens, used like the `Flux` that it wraps.

    Keys and values that it keeps and injects, and streams to start with, are those of its share. Everything
    else goes in and comes out whole, the same in all processes.

    Args:
        model: The transformer.
        group: The processes.
        graphed: The same transformer with its passes recorded. If None, none are.
    """

    def __init__(self, model: Flux, group: ProcessGroup, graphed: GraphedModel | None = None):
        self.model, self.group, self.graphed = model, group, graphed
        self.modulations = model.modulations
        self.shares: dict[Tensor, tuple[FreeTokens, list[int]]] = {}  # by the places of all others

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
        without_kv = intervention.hide_context - intervention.inject_context.keys()
        first_layer = 0 if start is None else start.layer
        if without_kv and not intervention.needs_context(range(first_layer, self.model.num_layers)):
            raise InputError(
                f"Got layers {sorted(without_kv)} that hide a context which is not computed. Several GPUs "
                "exchange its keys and values in all layers: inject them in these too"
            )
        if intervention.free is not None:
            return self._observe_free(inputs, intervention, intervention.free, mods)
        shard, gather = self.group.shard, self.group.gather
        counts = inputs.counts
        txt, image_txt, img, context = counts
        weights = {
            layer: shard(weight) if isinstance(weight, Tensor) else weight
            for layer, weight in intervention.inject_weights.items()
        }
        velocity, recorded = (self.graphed or self.model).observe(
            self._shard(inputs),
            replace(intervention, inject_weights=weights),
            start=start,
            mods=mods,
            cache=cache,
            exchange=self._exchange(counts, intervention, self.group.sizes(*counts)),
        )
        watched = {
            layer: (gather(q, 2, txt, img), gather(k, 2, txt, img, image_txt, context))
            for layer, (q, k) in recorded.watched.items()
        }
        return gather(velocity, 1, img), replace(recorded, watched=watched)

    def _observe_free(
        self, inputs: Inputs, intervention: Intervention, free: FreeTokens, mods: Sequence[Tensor] | None
    ) -> tuple[Tensor, Recorded]:
        """Compute this process's share of the free tokens; the others stay where they were kept."""
        num_img = inputs.img.shape[1]
        if free.others not in self.shares:
            # Once for all steps, since this waits for the GPU.
            self.shares[free.others] = self._share_free(free, num_img)
        own, held = self.shares[free.others]
        counts = inputs.counts._replace(img=len(free.computed))
        tokens = tuple(map(sum, zip(self.group.sizes(*counts), held)))
        if not intervention.needs_context(range(self.model.num_layers)):
            held = [0] * self.group.count  # where no context token is computed, they come last
        # The free tokens of this process may have been kept by others.
        inject = {
            layer: tuple(None if x is None else self.group.gather(x, 2, num_img) for x in kv)
            for layer, kv in intervention.inject.items()
        }
        # All noise tokens stay, of which the model takes this process's share of the free ones.
        part = self._shard(inputs)
        condition = replace(part.condition, channels=inputs.condition.channels)
        velocity, recorded = (self.graphed or self.model).observe(
            replace(part, img=inputs.img, img_ids=inputs.img_ids, condition=condition),
            replace(intervention, inject=inject, free=replace(own, kv=free.kv)),
            mods=mods,
            exchange=self._exchange(counts, intervention, tokens, held),
        )
        return self.group.total(velocity), recorded

    def _share_free(self, free: FreeTokens, num_img: int) -> tuple[FreeTokens, list[int]]:
        """The free tokens that this process computes, and how many of the others each process holds."""
        sizes = self.group.sizes(num_img)
        ends = torch.tensor(sizes, device=free.others.device).cumsum(0)
        owners = torch.searchsorted(ends, free.others, right=True)
        start = ends[self.group.rank] - sizes[self.group.rank]
        others = free.others[owners == self.group.rank] - start
        own = FreeTokens(self.group.shard(free.computed[None])[0], others)
        return own, owners.bincount(minlength=self.group.count).tolist()

    def streams(self, inputs: Inputs, mods: Sequence[Tensor] | None = None) -> list[Streams]:
        """See `Flux.streams`. The streams are those of this process's share."""
        exchange = self._exchange(inputs.counts, NOTHING, self.group.sizes(*inputs.counts))
        return self.model.streams(self._shard(inputs), mods, exchange)

    def _exchange(
        self,
        counts: TokenCounts,
        intervention: Intervention,
        tokens: tuple[int, ...],
        behind: Sequence[int] = (),
    ) -> AllGatherKV:
        """The exchange of a pass.

        Args:
            counts: Number of tokens of each kind that all processes compute.
            intervention: The pass's own.
            tokens: Number of tokens that each process holds.
            behind: Number of these that come after its context tokens. If empty, none do.
        """
        visible = None
        if intervention.hide_context and counts.context:
            seen: list[bool] = []
            contexts = self.group.sizes(counts.context)
            for own, context, after in zip_longest(tokens, contexts, behind, fillvalue=0):
                seen += [True] * (own - context - after) + [False] * context + [True] * after
            visible = torch.tensor(seen).nonzero()[:, 0].to(next(self.model.parameters()).device)
        return AllGatherKV(self.group, tokens, max(self.group.sizes(*counts)), counts.context, visible)

    def _shard(self, inputs: Inputs) -> Inputs:
        context, strength = inputs.counts.context, inputs.condition.context_strength
        if 0 < context < self.group.count and strength != 1:
            raise InputError(
                f"Got the context strength {strength:g} for {context} context tokens on {self.group.count} "
                "GPUs, of which each needs one: use fewer GPUs"
            )
        tokens = ("img", "img_ids", "txt", "txt_ids")
        shards = {name: self.group.shard(getattr(inputs, name)) for name in tokens}
        return replace(inputs, **shards, condition=inputs.condition.map(self.group.shard))
