"""CPU offloading: models stay in host memory and are copied to the GPU while they compute.

A model is copied whole, or some of its blocks are streamed: each is copied while the one before it computes.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes, as CUDA aligns its own allocations


class _TensorSlots:
    """The parameters and buffers of some modules, and where they are used. Tied tensors are listed once.

    Attributes:
        values: The tensors.
        slots: The dictionary of a module, the name in it and the index in `values`, for each use.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        stores: list[dict[str, Any]] = [
            store for module in modules for store in (module._parameters, module._buffers)
        ]
        held = [(store, name, x) for store in stores for name, x in store.items() if x is not None]
        self.values = list({id(x): x for _, _, x in held}.values())
        indices = {id(x): index for index, x in enumerate(self.values)}
        self.slots = [(store, name, indices[id(x)]) for store, name, x in held]
        self.are_parameters = [isinstance(x, nn.Parameter) for x in self.values]

    def assign(self, values: Sequence[Tensor]) -> None:
        """Make the modules use these tensors, given in the order of `self.values`."""
        # A new Parameter, because `.data` of a tensor made in inference mode cannot be set.
        pairs = zip(values, self.are_parameters, strict=True)
        values = [nn.Parameter(x, False) if is_parameter else x for x, is_parameter in pairs]
        for store, name, index in self.slots:
            store[name] = values[index]


class _HostBlock:
    """A block whose tensors are adjacent in host memory, so that a single copy transfers all of them.

    Attributes:
        host: The bytes of all tensors.
        nbytes: Their number.
    """

    def __init__(self, module: nn.Module, pinned: bool):
        self.tensors = _TensorSlots(list(module.modules()))
        self.layout, self.nbytes = [], 0
        for x in self.tensors.values:
            self.layout.append((slice(self.nbytes, self.nbytes + x.nbytes), x.dtype, x.shape))
            self.nbytes += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = torch.empty(self.nbytes, dtype=torch.uint8)
        if pinned:
            self._pin()
        for original, view in zip(self.tensors.values, self._views(self.host), strict=True):
            view.copy_(original)
        self.tensors.values = []  # frees the originals
        self.rebind(self.host)

    def _pin(self) -> None:
        """Pin the memory, so that it is copied at full speed while the GPU computes.

        It is pinned in place, because torch rounds its own pinned memory up to powers of two. If the system
        refuses, copies are slower.
        """
        runtime: Any = torch.cuda.cudart()  # a module that torch does not annotate
        address = self.host.data_ptr()
        if int(runtime.cudaHostRegister(address, self.host.nbytes, 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
            return
        # CUDA reports the refusal once more, to the next operation.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[where].view(dtype).view(shape) for where, dtype, shape in self.layout]

    def rebind(self, buffer: Tensor) -> None:
        """Make the block's tensors views of `buffer`, which holds the bytes of `host`."""
        self.tensors.assign(self._views(buffer))


class BlockStreamer:
    """Copies blocks to the device in turn, into two buffers: for the computing block and for the next one.

    On a CPU the copies are made too, without CUDA streams and without any benefit.

    Blocks compute in order or, in a backward pass, in reverse order. The last two show which one is next.

    Attributes:
        buffers: The two buffers on the device. Empty while the streamer is closed.
        resident: The number of the block in each buffer.
        last: The number of the block that computed last.
        backwards: Whether blocks compute in reverse order.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.blocks = [_HostBlock(block, self.on_gpu) for block in blocks]
        self.buffers: list[Tensor] = []
        self.resident: list[int | None] = [None, None]
        self.last, self.backwards = 0, False
        self.stream: torch.cuda.Stream | None = None

    def open(self) -> None:
        """Allocate the buffers and start copying the first block."""
        size = max(block.nbytes for block in self.blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.resident = [None, None]
        self.last, self.backwards = 0, False
        self.stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        self.copy(0, buffer=0)

    def ensure_on_device(self, number: int) -> None:
        """Make a block's tensors available to the kernels launched next, and start copying the next block.

        Blocks may be requested in any order. Only in their own order, or in reverse, is there no waiting.
        """
        if number not in self.resident:
            self.copy(number, buffer=0)
        buffer = self.resident.index(number)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.blocks[number].rebind(self.buffers[buffer])
        if number != self.last:
            self.backwards = number == self.last - 1
        self.last = number
        following = (number + (-1 if self.backwards else 1)) % len(self.blocks)
        if following not in self.resident:
            self.copy(following, 1 - buffer)

    def copy(self, number: int, buffer: int) -> None:
        """Start copying a block into a buffer. The block that was there goes back to host memory."""
        self._rebind_to_host(buffer)
        block = self.blocks[number]
        self.resident[buffer] = number
        if self.stream is None:
            self.buffers[buffer][: block.nbytes].copy_(block.host)
            return
        # Kernels that still read this buffer were launched before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.buffers[buffer][: block.nbytes].copy_(block.host, non_blocking=True)

    def _rebind_to_host(self, buffer: int) -> None:
        number = self.resident[buffer]
        if number is not None:
            self.blocks[number].rebind(self.blocks[number].host)

    def close(self) -> None:
        """Free the buffers."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for buffer in range(2):
            self._rebind_to_host(buffer)
        self.buffers = []


class StreamedBlock(nn.Module):
    """Replaces a block in its stack and has the weights copied to the device when it is called."""

    block: Any  # of Flux, or of T5, which has neither `modulate` nor `run`

    def __init__(self, block: nn.Module, streamer: BlockStreamer, number: int):
        super().__init__()
        self.block, self.streamer, self.number = block, streamer, number

    def modulate(self, vec: Tensor) -> Tensor:
        """Call the block's `modulate`. It takes one more copy per schedule, and keeps results bit-equal."""
        self.streamer.ensure_on_device(self.number)
        return self.block.modulate(vec)

    def run(self, *args, **kwargs) -> Any:
        """Call the block's `run`."""
        self.streamer.ensure_on_device(self.number)
        return self.block.run(*args, **kwargs)

    def forward(self, *args, **kwargs) -> Any:
        """Call the block."""
        self.streamer.ensure_on_device(self.number)
        return self.block(*args, **kwargs)


def evenly_spaced(count: int, total: int) -> list[int]:
    """Return `count` of the numbers below `total`, at equal distances: the blocks that are streamed.

    The blocks between two streamed ones compute while the second is copied.
    """
    return [number * total // count for number in range(count)]


class Offloaded:
    """A model that stays in host memory while it does not compute.

    Args:
        module: The model.
        device: Where it computes.
        stacks: The model's lists of blocks, in the order in which they compute.
        streamed: How many of those blocks, at most, are streamed. The rest is copied as a whole.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        stacks: Sequence[nn.ModuleList] = (),
        streamed: int = 0,
    ):
        self.module, self.device = module, device
        self.streamer: BlockStreamer | None = None
        places = [(stack, index) for stack in stacks for index in range(len(stack))]
        streamed = min(streamed, len(places))
        if streamed:
            chosen = [places[number] for number in evenly_spaced(streamed, len(places))]
            self.streamer = BlockStreamer([stack[index] for stack, index in chosen], device)
            for number, (stack, index) in enumerate(chosen):
                stack[index] = StreamedBlock(stack[index], self.streamer, number)
        self.tensors = _TensorSlots(_unstreamed(module))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the model on the device inside a `with` statement."""
        self.tensors.assign([x.to(self.device) for x in self.tensors.values])
        try:
            if self.streamer:
                self.streamer.open()
            yield
        finally:
            if self.streamer:
                self.streamer.close()
            self.tensors.assign(self.tensors.values)


def _unstreamed(module: nn.Module) -> list[nn.Module]:
    """The module and all modules inside it, except streamed blocks."""
    if isinstance(module, StreamedBlock):
        return []
    return [module, *(part for child in module.children() for part in _unstreamed(child))]
