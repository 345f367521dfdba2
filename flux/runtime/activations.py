"""Activations, measured before anything loads: models run on torch's meta device, which allocates nothing."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of new tensors while the mode is active.

    Args:
        known: Tensors that exist already. They are not counted.

    Attributes:
        current: Bytes of the new tensors that are alive now.
        peak: The largest value that `current` had.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in known}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        for x in results:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.seen:
                self._add(x.untyped_storage())
        # In inference mode this composite operation is dispatched as it is. cuDNN copies its input and its
        # output into the memory layout that it prefers.
        if func is torch.ops.aten.conv2d.default:
            self.peak = max(self.peak, self.current + args[0].nbytes + results[0].nbytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, storage_id: int, nbytes: int) -> None:
        self.seen.discard(storage_id)
        self.current -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Makes attention allocate its result only, as the fused kernels of a GPU do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def live_bytes(run: Callable[[], object], known: list[Tensor]) -> int:
    """Return the most bytes that tensors made by `run` occupy at the same time.

    Args:
        run: The computation.
        known: Tensors that exist before it. They are not counted.
    """
    with torch.inference_mode(), LiveBytes(known) as live, _FusedAttention():
        run()
    return live.peak
