"""The models in memory: one is loaded when a run needs it, and others make room for it."""

import gc
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from flux.loaded_model import LoadedModel
from flux.runtime.devices import pick_device, pick_dtype, return_freed_memory
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import Plan, free_memory
from flux.settings.resolved import ResolvedModel
from flux.weights.find import find_model
from flux.weights.open_model import OpenModel


class Holder(Protocol):
    """Something that holds a model: `flux.studio.engine.Engine`."""

    settings: ResolvedModel

    @property
    def pipe(self) -> LoadedModel:
        """The loaded model."""
        ...

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        ...

    def load(self, opened: OpenModel) -> None:
        """Load the model from its opened files."""
        ...

    def free(self) -> None:
        """Remove the model from memory."""
        ...


class Memory:
    """The models in memory.

    Attributes:
        lock: Held by the run that computes. Only its owner may call `use`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._loaded: list[Holder] = []  # the last used one last

    def add(self, holder: Holder) -> None:
        """Note that this holder's model is loaded and used."""
        self._loaded = [*(other for other in self._loaded if other is not holder), holder]

    def use(self, holder: Holder) -> None:
        """Load the holder's model unless it is there. If it needs room, the least recently used are freed.

        A model that was freed comes back with its next run, also if this one then cannot be loaded.

        Raises:
            InputError: Its files are gone or wrong, which is found before any other is freed; or as
                `LoadedModel.load`.
        """
        if not holder.is_loaded:
            opened = find_model(holder.settings, download=False)
            opened.check()
            while self._loaded and not fits_beside(opened, holder.settings):
                self._loaded.pop(0).free()
                give_back()
            try:
                holder.load(opened)
                for other in self._loaded:
                    share_weights(holder.pipe, other.pipe)
            finally:
                give_back()  # what it shares with others, or what was loaded of it before an error
        self.add(holder)


def fits_beside(opened: OpenModel, settings: ResolvedModel) -> bool:
    """Tell whether a model fits into memory beside those that are loaded.

    The models of this package are small, and always do. Any other does on a GPU whose free memory holds all
    of its parts. In main memory, and where parts of it wait there, it is taken not to fit.
    """
    if opened.spec.folder is not None:
        return True
    device = pick_device(settings.device)
    free = free_memory(device)
    if free is None or settings.offload not in ("none", "auto"):
        return False
    dtype = pick_dtype(settings.dtype, device, opened.spec)
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    sources, ranks = opened.sources(), opened.ranks_beside()
    estimate = MemoryEstimator(settings, opened.spec, sources, dtype, text_dtype, True, ranks)
    return Plan.of(estimate, "none", tiled=settings.tiled).fits(free)


def share_weights(pipe: LoadedModel, other: LoadedModel) -> None:
    """Let a model use another one's tensors where they are equal: those of the files that both are made of.

    So they are in memory once, whichever model is freed first. Nothing writes into a loaded model's tensors.
    Models of which parts wait in main memory are left alone, as their tensors move.
    """
    if pipe.offloaded or other.offloaded:
        return
    pairs = (pipe.t5, other.t5), (pipe.clip, other.clip), (pipe.ae, other.ae), (pipe.model, other.model)
    for module, others in pairs:
        known = dict(tensors_of(others))
        for name, tensor in tensors_of(module):
            twin = known.get(name)
            if twin is not None and is_equal(tensor, twin):
                tensor.data = twin.data


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List a module's parameters and buffers, by their names."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, of the same dtype and on the same device."""
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def give_back() -> None:
    """Give the memory of models that were removed back to the device and the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()
