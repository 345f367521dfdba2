"""A kept reference: the image keys and values of all its steps stay in memory for later edits.

Image queries do so too, in the vital layers, if the setting `parts` of all edits names them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from flux.editing.source import OnStep, ReferenceStep, Source, find_source, with_bar
from flux.editing.store import rounded_bytes
from flux.loaded_model import LoadedModel
from flux.runtime.devices import total_memory
from flux.settings.resolved import ResolvedEdit


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference whose keys and values are kept, so that a step of another edit computes the edit alone.

    Attributes:
        source: Where it began.
        layers: The layers whose keys and values are kept, the most vital first.
        steps: All steps. Empty for FlowEdit, which injects nothing.
        image: The reference decoded. For a photograph, the autoencoder's reconstruction.
    """

    source: Source
    layers: tuple[int, ...]
    steps: list[ReferenceStep]
    image: Image.Image


def keep_reference(
    pipe: LoadedModel,
    settings: ResolvedEdit,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    *,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Reference:
    """Generate or invert the reference, and keep its image keys and values at every step.

    They are kept on the device if they fill at most half of its free memory, else in main memory. If those of
    all layers fit on the device, they are kept, so that edits can be sparse; if need be, all but those of the
    given layers in 8 bits.

    Args:
        pipe: The models.
        settings: Describe the reference. Their edits are ignored.
        layers: Where to keep keys and values, the most vital layers first.
        photo: The photograph to edit, described by the prompt. If None, the reference is generated.
        on_step: Called with each step, its number and the number of steps. An exception from it ends the run.
        progress: Whether to show progress bars.
    """
    source = find_source(pipe, settings, photo, on_step, progress)
    steps: list[ReferenceStep] = []
    latent, done, on_device = source.start, source.inverted_steps, True
    if not source.inversion_free:
        with pipe.denoising() as model:
            vital = frozenset(layers)
            kept, rounds = _layers_to_keep(pipe, source, vital)
            queries = vital if settings.keeps_queries else frozenset()
            computed = source.steps(model, lambda _: kept, queries)
            for index, step in enumerate(with_bar(computed, "reference", source.num_steps, progress)):
                step = step.rounded(vital) if rounds else step
                if index == 0:
                    on_device = fits_on_device(pipe.device, source.num_steps * step.num_bytes())
                if on_step and step.step:
                    on_step(step.step, done + index, done + source.num_steps)
                steps.append(step.to(pipe.device) if on_device else step.to(torch.device("cpu"), pinned=True))
        latent = steps[-1].next_latent
    [image] = source.decode(pipe, latent)
    return Reference(source, tuple(layers), steps, source.paste_back(image))


def _layers_to_keep(pipe: LoadedModel, source: Source, vital: frozenset[int]) -> tuple[frozenset[int], bool]:
    """Decide what a reference keeps: all layers for sparse edits if there is room, else the vital ones.

    Returns:
        The layers, and whether all but the vital ones are rounded to 8 bits.
    """
    settings, params, every = source.settings, pipe.model.params, frozenset(range(pipe.model.num_layers))
    if not settings.sparse or not source.can_be_sparse:
        return vital, False
    passes = 1 if source.cond.negative is None else 2
    of_layer = passes * source.num_steps * 2 * source.start.shape[1] * params.hidden_size
    whole = pipe.dtype.itemsize * of_layer
    rounded = rounded_bytes(of_layer, params.hidden_size // params.num_heads)
    queries = len(vital) * whole // 2 if settings.keeps_queries else 0
    if _has_room(pipe.device, len(every) * whole + queries):
        return every, False
    if _has_room(pipe.device, len(vital) * whole + queries + (len(every) - len(vital)) * rounded):
        return every, True
    return vital, False


def _has_room(device: torch.device, size: int) -> bool:
    """Whether the device has room for so many bytes. Without a GPU, the memory is shared with all else."""
    memory = None if device.type == "cuda" else total_memory(device)
    return fits_on_device(device, size) and (memory is None or size <= memory / 4)


def fits_on_device(device: torch.device, size: int) -> bool:
    """Whether so many bytes fill at most half of the device's memory, free or reserved by the allocator."""
    if device.type != "cuda":
        return True
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= (torch.cuda.mem_get_info(device)[0] + reserve) / 2


def prefetch(steps: Sequence[ReferenceStep], device: torch.device) -> Iterator[ReferenceStep]:
    """Yield kept steps on the device. Those in main memory are copied during the step before."""
    tensors = steps[0].tensors()
    if device.type != "cuda" or not tensors or tensors[0].is_cuda:
        yield from steps
        return
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(step: ReferenceStep) -> ReferenceStep:
        with torch.cuda.stream(stream):
            fetched = step.to(device)
        for x in fetched.tensors():
            x.record_stream(main)
        return fetched

    coming = fetch(steps[0])
    for following in (*steps[1:], None):
        main.wait_stream(stream)
        current, coming = coming, fetch(following) if following else coming
        yield current
        current.free()
