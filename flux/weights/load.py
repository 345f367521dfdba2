"""From a checkpoint to a module: names are matched strictly, tensors go straight to a device."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.modules.linear import PackedLinear
from flux.specs import configs
from flux.weights.checkpoint import Checkpoint, open_checkpoint
from flux.weights.headers import short_name
from flux.weights.layouts import Part
from flux.weights.numbers import FiniteCheck
from flux.weights.scales import EIGHT_BIT_FLOATS
from flux.weights.sources import TensorSource, find_sources

P = TypeVar("P")
M = TypeVar("M", bound=nn.Module)
INPUTS = {64: "a text-to-image or Kontext model", 128: "a canny or depth model", 384: "a Fill model"}
"""The kinds of model by the channels of their image tokens."""


def read_weights(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all tensors of a file in `dtype`, under the file's names, with scales multiplied in.

    Raises:
        InputError: The path holds no complete weight file.
    """
    return {name: tensor.read(device).to(dtype) for name, tensor in open_checkpoint(path).tensors.items()}


def on_meta(make: Callable[[P], M], params: P) -> M:
    """Make a module without memory, on torch's meta device."""
    with torch.device("meta"):
        return make(params)


def match_names(module: nn.Module, checkpoint: Checkpoint, part: Part) -> dict[str, TensorSource]:
    """Find how each of a module's tensors is made of a checkpoint's. Reads no tensor.

    Args:
        module: The network; it may be on the meta device.
        checkpoint: The opened file or folder.
        part: Which network it is.

    Raises:
        InputError: The checkpoint's names and shapes are not exactly the module's. The message says what
            differs.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    sources, unexpected = find_sources(checkpoint, part, shapes)
    missing = sorted(shapes.keys() - sources.keys())
    reshaped = [
        f"{name} {sources[name].shape} instead of {shapes[name]}"
        for name in sorted(sources)
        if sources[name].shape != shapes[name]
    ]
    differing = {
        "missing": missing,
        "unexpected": list(map(short_name, unexpected)),
        "of another shape:": reshaped,
    }
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in differing.items()
        if names
    ]
    if problems:
        hint = _hint([*missing, *unexpected], bool(missing), bool(reshaped), sources)
        raise InputError(f"{checkpoint.path} is not this model's: {'; '.join(problems)}{hint}")
    return sources


def _hint(differing: list[str], missing: bool, reshaped: bool, sources: Mapping[str, TensorSource]) -> str:
    """A guess at the file's real kind."""
    columns = sources["img_in.weight"].shape[-1:] if "img_in.weight" in sources else ()
    if reshaped and columns and columns[0] in INPUTS:
        names = _models_of(columns[0], sources)
        return f"; it is {INPUTS[columns[0]]}" + (f": load it as {' or '.join(names)}" if names else "")
    if not reshaped and all("guidance_in." in name or "guidance_embedder." in name for name in differing):
        is_nano = sources["img_in.weight"].shape[0] == configs["flux-nano"].params.hidden_size
        family = "flux-nano" if is_nano else "flux-dev"
        if missing:
            schnell = "flux-nano-schnell" if is_nano else "flux-schnell"
            return (
                f"; it has no guidance_in: it is a schnell file, load it as {schnell}; or a de-distilled "
                "dev, load it as flux-dev-de-distilled"
            )
        return f"; it is a dev file (it has guidance_in), load it as {family}"
    for stack in ("double", "single"):
        left, lost = (_blocks_in(names, stack) for names in (sources, differing if missing else ()))
        if left and lost and left.isdisjoint(lost):
            return (
                f"; it has {len(left)} of {len(left | lost)} {stack} blocks: it is a pruned model (such as "
                "FLUX.1-lite or Flex.1), which is not known here"
            )
    return ""


def _models_of(channels: int, sources: Mapping[str, TensorSource]) -> list[str]:
    """The models whose files take so many channels and are as wide as this one."""
    width, has_guidance = sources["img_in.weight"].shape[0], "guidance_in.in_layer.weight" in sources
    params = {name: spec.base_params or spec.params for name, spec in configs.items()}
    return [
        name
        for name, sizes in params.items()
        if (sizes.in_channels, sizes.hidden_size) == (channels, width)
        and sizes.guidance_embed >= has_guidance
    ]


def _blocks_in(names: Iterable[str], stack: str) -> set[int]:
    found = (re.match(rf"{stack}_blocks\.(\d{{1,4}})\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def load_into(
    module: nn.Module,
    sources: Mapping[str, TensorSource],
    device: torch.device | str,
    dtype: torch.dtype,
    keep_8bit: bool,
) -> None:
    """Give a module on the meta device its tensors, one after the other, and set it to evaluation mode.

    Args:
        module: The network.
        sources: How each of its tensors is made, see `match_names`.
        device: Where the tensors are put.
        dtype: The dtype of everything that does not stay packed.
        keep_8bit: Whether matrices of 8-bit floats stay as they are stored, as GGUF blocks always do.

    Raises:
        InputError: A tensor holds numbers that are NaN or infinite.
    """
    check = FiniteCheck()
    for name, source in sources.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        kind, path = source.kind, source.parts[0].stored.path
        stays_packed = source.is_packed and (keep_8bit or kind not in EIGHT_BIT_FLOATS)
        if leaf == "weight" and isinstance(owner, nn.Linear) and kind is not None and stays_packed:
            packed, scale = source.read_packed(device)
            check.add_packed(name, path, packed, kind)
            if scale is not None:
                check.add(f"the scale of {name}", path, scale)
            parent, _, attribute = owner_name.rpartition(".")
            linear = PackedLinear(packed, kind, owner.bias, scale, dtype)
            setattr(module.get_submodule(parent), attribute, linear)
        else:
            values = source.read(device, dtype)
            check.add(name, path, values)
            setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
    check.finish(dtype)
    module.eval().requires_grad_(False)
