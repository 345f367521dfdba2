"""Nets whose weights lie in host memory, and come to the device for as long as they compute: whole, or block
by block, the next block on its way while this one computes.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes, that of CUDA's own allocations


class _Tensors:
    """The parameters and buffers that some modules hold, tied ones in several places."""

    def __init__(self, modules: Sequence[nn.Module]):
        stores = [store for module in modules for store in (module._parameters, module._buffers)]
        held = [(store, name, x) for store in stores for name, x in store.items() if x is not None]
        self.values = list({id(x): x for _, _, x in held}.values())
        numbers = {id(x): number for number, x in enumerate(self.values)}
        self.places = [(store, name, numbers[id(x)]) for store, name, x in held]
        self.are_parameters = [isinstance(x, nn.Parameter) for x in self.values]

    def hold(self, values: Sequence[Tensor]) -> None:
        """The modules hold these from now on, in the order of `values`."""
        # A new Parameter, not `.data`: tensors made in inference mode refuse that.
        pairs = zip(values, self.are_parameters, strict=True)
        values = [nn.Parameter(x, False) if is_parameter else x for x, is_parameter in pairs]
        for store, name, number in self.places:
            store[name] = values[number]


class _Block:
    """A block whose tensors lie behind one another in host memory, so that a single copy brings them all."""

    def __init__(self, module: nn.Module, pinned: bool):
        self.tensors = _Tensors(list(module.modules()))
        self.layout, self.nbytes = [], 0
        for x in self.tensors.values:
            self.layout.append((slice(self.nbytes, self.nbytes + x.nbytes), x.dtype, x.shape))
            self.nbytes += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(self.nbytes, dtype=torch.uint8)
        if pinned:
            self._pin()
        for own, view in zip(self.tensors.values, self._views(self.host)):
            view.copy_(own)
        self.tensors.values = []  # so that what it was made of may go
        self.lie_in(self.host)

    def _pin(self) -> None:
        """Locks the memory in its place: it is then copied at the bus's full speed, beside the computation.

        In place, for torch's own pinned memory comes in powers of two, up to twice as much. Where the system
        refuses, only the speed suffers.
        """
        runtime, address = torch.cuda.cudart(), self.host.data_ptr()
        if int(runtime.cudaHostRegister(address, self.host.nbytes, 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
            return
        try:
            # The next operation, whichever it is, is told of the refusal and forgets it.
            torch.zeros(1, device="cuda")
        except RuntimeError:
            pass

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat[where].view(dtype).view(shape) for where, dtype, shape in self.layout]

    def lie_in(self, flat: Tensor) -> None:
        """The module's tensors are views of these bytes, which are those of `host`."""
        self.tensors.hold(self._views(flat))


class Feed:
    """Brings blocks to the device in turn. Two of them have room there: the one at work and the next.

    On a CPU the same happens without streams, and without any gain.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.blocks = [_Block(block, self.on_gpu) for block in blocks]
        self.rooms: list[Tensor] = []

    def open(self) -> None:
        """Takes room for two blocks on the device, and sends the first one there."""
        size = max(block.nbytes for block in self.blocks)
        self.rooms = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.guests: list[int | None] = [None, None]
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        self._send(0, room=0)

    def bring(self, number: int) -> None:
        """This block's tensors are on the device when what is launched next runs, and the next block follows.

        Blocks may come in any order; only their own order is without waiting.
        """
        if number not in self.guests:
            self._send(number, room=0)
        room = self.guests.index(number)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.blocks[number].lie_in(self.rooms[room])
        following = (number + 1) % len(self.blocks)
        if following not in self.guests:
            self._send(following, 1 - room)

    def _send(self, number: int, room: int) -> None:
        guest, block = self.guests[room], self.blocks[number]
        if guest is not None:
            self.blocks[guest].lie_in(self.blocks[guest].host)
        self.guests[room] = number
        if self.stream is None:
            self.rooms[room][: block.nbytes].copy_(block.host)
            return
        # What is computing in this room was launched before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.rooms[room][: block.nbytes].copy_(block.host, non_blocking=True)

    def close(self) -> None:
        """Gives the room back."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for guest in self.guests:
            if guest is not None:
                self.blocks[guest].lie_in(self.blocks[guest].host)
        self.rooms = []


class Streamed(nn.Module):
    """Stands in for a block, and has its weights brought when it is called."""

    def __init__(self, block: nn.Module, feed: Feed, number: int):
        super().__init__()
        self.block, self.feed, self.number = block, feed, number

    def modulate(self, vec: Tensor) -> Tensor:
        """The block's own: brought once more for a schedule, so that pictures stay those of nets that are not
        streamed, to the last bit.
        """
        self.feed.bring(self.number)
        return self.block.modulate(vec)

    def forward(self, *args, **kwargs):
        self.feed.bring(self.number)
        return self.block(*args, **kwargs)


def evenly_spaced(count: int, total: int) -> list[int]:
    """Which `count` of `total` blocks are streamed. Evenly: each has the time of those between to come."""
    return [number * total // count for number in range(count)]


class Offloaded:
    """A net that lies in host memory while it has nothing to do.

    Args:
        stacks: the net's lists of blocks, in the order in which they compute.
        streamed: how many of those blocks, at most, are brought one by one; the rest comes and goes whole.
    """

    def __init__(
        self, net: nn.Module, device: torch.device, stacks: Sequence[nn.ModuleList] = (), streamed: int = 0
    ):
        self.net, self.device, self.feed = net, device, None
        places = [(stack, index) for stack in stacks for index in range(len(stack))]
        streamed = min(streamed, len(places))
        if streamed:
            chosen = [places[number] for number in evenly_spaced(streamed, len(places))]
            self.feed = Feed([stack[index] for stack, index in chosen], device)
            for number, (stack, index) in enumerate(chosen):
                stack[index] = Streamed(stack[index], self.feed, number)
        self.tensors = _Tensors(_unstreamed(net))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The net is on the device for as long as the block lasts."""
        self.tensors.hold([x.to(self.device) for x in self.tensors.values])
        try:
            if self.feed:
                self.feed.open()
            yield
        finally:
            if self.feed:
                self.feed.close()
            self.tensors.hold(self.tensors.values)


def _unstreamed(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, Streamed):
        return []
    return [module, *(part for child in module.children() for part in _unstreamed(child))]
