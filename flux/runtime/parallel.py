"""One picture on several cards: each process of torchrun holds a share of the tokens, of text and of image.
Their queries meet the keys and values of all tokens, which the processes bring together in each layer.

    torchrun --nproc_per_node 2 demo_4_edit.py edit.json --parallel 2

Everything else, from the noise to the pixels, each process does alike: all go on from the same latents.
"""

import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import torch
import torch.distributed as dist
from torch import Tensor

from flux.errors import InputError, launched
from flux.intervention import NOTHING, Findings, Intervention
from flux.math import KeysValues
from flux.model import Flux, Streams
from flux.modules.step_cache import StepCache
from flux.settings.demos import Divisible


@dataclass(frozen=True)
class Ranks:
    """The processes that share a picture's tokens: `count` of them, of which this one is number `rank`.

    Attributes:
        device: this process's own; None: as the settings say.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    def share(self, tokens: Tensor) -> Tensor:
        """This process's part of all tokens, "B n ..."; without a rest, the first ones have one more."""
        return tokens.tensor_split(self.count, dim=1)[self.rank]

    def sizes(self, *runs: int) -> tuple[int, ...]:
        """How many tokens each process holds of runs that are so long, each shared by itself."""
        return tuple(
            sum(run // self.count + (rank < run % self.count) for run in runs) for rank in range(self.count)
        )

    def total(self, x: Tensor) -> Tensor:
        """The sum of what all processes have in `x`, which it replaces."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def whole(self, x: Tensor, dim: int, *runs: int) -> Tensor:
        """All tokens, from the shares of each process along `dim`, where such runs follow one another."""
        places = [self.share(run[None])[0] for run in torch.arange(sum(runs), device=x.device).split(runs)]
        shape = [*x.shape[:dim], sum(runs), *x.shape[dim + 1 :]]
        # A sum with zeros is exact, and unlike a gathering minds no shares of different sizes.
        return self.total(x.new_zeros(shape).index_copy_(dim, torch.cat(places), x))


ALONE = Ranks()


def join(settings: Divisible) -> Ranks:
    """Meets the other processes that torchrun started: `ALONE` where there are none.

    Raises:
        InputError: not `settings.parallel` processes; more of them than cards; a device of which there is
            only one.
    """
    count, here = settings.parallel, int(os.environ["WORLD_SIZE"]) if launched() else 1
    if here == 1 < count:
        command = shlex.join(("torchrun", "--nproc_per_node", str(count), *sys.argv))
        raise InputError(f"Got parallel {count}, but this is a single process: start it with {command}")
    if here != count:
        raise InputError(f"Got parallel {count}, but torchrun started {here} processes: make them equal")
    if count == 1:
        return ALONE
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"Got device {settings.device!r} with parallel {count}, where each process has one of its own: "
            "give cuda, cpu or auto"
        )
    device = torch.device("cpu")
    if settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available()):
        cards, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if cards < wanted:
            raise InputError(f"Got {wanted} processes, but this machine has {cards} CUDA cards: start fewer")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # Wherever it can, NCCL then leaves copying to the cards' copy engines: its kernels would wait for a
        # product to end that is to be computed meanwhile.
        os.environ.setdefault("NCCL_CTA_POLICY", "2")
    on_cards = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    dist.init_process_group(**on_cards)
    return Ranks(dist.get_rank(), count, device)


WIDE = torch.complex128  # the largest numbers there are: the fewer are copied, the faster


@dataclass(frozen=True)
class Gathering:
    """`flux.math.Exchange`. What comes lies in the order of the processes: attention minds none.

    Attributes:
        tokens: how many of them each process holds.
    """

    ranks: Ranks
    tokens: tuple[int, ...]

    def __call__(self, k: Tensor, v: Tensor) -> Callable[[], KeysValues]:
        (batch, heads, own, size), most = k.shape, max(self.tokens)
        # Token by token: shares behind one another are then those of all, if all are equally large.
        shape = self.ranks.count * most, batch, 2, heads, size
        # A compiler knows no waiting, and none of that memory.
        aside = not torch.compiler.is_compiling()
        brought = _within_reach(k, shape) if aside and k.is_cuda else k.new_empty(shape)
        sent = brought[self.ranks.rank * most :][:most]
        for part, x in enumerate((k, v)):
            place, x = sent[:own, :, part], x.permute(2, 0, 1, 3)
            if aside and size * k.itemsize % WIDE.itemsize == 0:
                place, x = place.view(WIDE), x.view(WIDE)
            place.copy_(x)
        work = dist.all_gather_into_tensor(brought, sent, async_op=aside)

        def whole() -> KeysValues:
            if aside:
                work.wait()
            every = brought
            if min(self.tokens) < most:
                every = torch.cat([share[:n] for share, n in zip(brought.split(most), self.tokens)])
            return tuple(x.permute(1, 2, 0, 3) for x in every.unbind(dim=2))

        return whole


def _within_reach(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor that other cards' copy engines write to, if these cards can do that. It is the
    same memory every time: what came for a layer has been read before that for the next one begins to come.
    """
    if not _reach_one_another():
        return like.new_empty(shape)
    size = math.prod(shape) * like.itemsize
    return _shared(1 << (size - 1).bit_length(), like.device)[:size].view(like.dtype).view(shape)


@cache
def _reach_one_another() -> bool:
    """Whether every card of the group can be written to from every other, by NVIDIA's library."""
    cards = range(int(os.environ["LOCAL_WORLD_SIZE"]))
    one_machine = len(cards) == dist.get_world_size() and not torch.version.hip
    return one_machine and all(torch.cuda.can_device_access_peer(a, b) for a, b in permutations(cards, 2))


@cache
@torch.inference_mode(False)
def _shared(size: int, device: torch.device) -> Tensor:
    """So many bytes on each card, known to all of them."""
    # Not at the top: not every build of torch has it.
    import torch.distributed._symmetric_memory as symm_mem

    symm_mem.set_backend("NCCL")
    room = symm_mem.empty(size, dtype=torch.uint8, device=device)
    symm_mem.rendezvous(room, dist.group.WORLD)
    return room


class Divided:
    """A transformer at work on this process's share of the tokens, used as the `Flux` that it holds.

    Keys and values that it keeps are those of its share, and such it takes; everything else goes in and comes
    out whole, the same in all processes.
    """

    def __init__(self, model: Flux, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.num_layers, self.double_blocks = model.num_layers, model.double_blocks
        self.modulations = model.modulations

    def observe(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        intervention: Intervention = NOTHING,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Findings]:
        """As `Flux.observe`; `start` holds this process's share."""
        runs, share = (txt.shape[1], img.shape[1]), self.ranks.share
        weights = {n: share(w) if isinstance(w, Tensor) else w for n, w in intervention.weights.items()}
        velocity, found = self.model.observe(
            *map(share, (img, img_ids, txt, txt_ids)),
            *(timesteps, y, guidance, replace(intervention, weights=weights), start, mods, cache),
            exchange=Gathering(self.ranks, self.ranks.sizes(*runs)),
        )
        watched = {
            layer: tuple(self.ranks.whole(x, 2, *runs) for x in pair) for layer, pair in found.watched.items()
        }
        return self.ranks.whole(velocity, 1, runs[1]), replace(found, watched=watched)
