"""Keys and values of the first row injected in the others, by hooks of ComfyUI's model patcher.

ComfyUI runs all rows of a batch together. Row 0 is the reference, the other rows are edits. With a negative
prompt the batch holds one chunk of rows for each prompt, so each chunk has its own reference.

Shapes: B batch, H heads, N tokens, D head size. Text tokens come first, then the image's, then those of
context images.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .layers import block_of, check_layers

TOKENS = "stable_flow_tokens"


@dataclass(frozen=True)
class Window:
    """The part of sampling in which a change acts, by noise level."""

    high: float
    low: float

    @classmethod
    def of(cls, model: Any, start_percent: float, end_percent: float) -> "Window":
        """Turn fractions of the sampling, 0..1, to noise levels of `model`."""
        if start_percent > end_percent:
            raise ValueError(f"Got start_percent {start_percent} after end_percent {end_percent}")
        sampling = model.get_model_object("model_sampling")
        return cls(
            float(sampling.percent_to_sigma(start_percent)), float(sampling.percent_to_sigma(end_percent))
        )

    def holds(self, options: dict[str, Any]) -> bool:
        """Whether the current step lies in the window: its start does, its end does not."""
        return self.low < float(options["sigmas"][0]) <= self.high


def inject_from_first_row(x: Tensor, weight: float, chunks: int, first: int, last: int) -> Tensor:
    """Move image keys or values of each chunk's other rows to those of its first row.

    own + weight * (first row's - own), Stable Flow, section 3.2.

    Args:
        x: Keys or values, "B H N D".
        weight: How far they move, 0..1.
        chunks: Number of equal chunks of rows.
        first: The first image token.
        last: The token after the last one.

    Returns:
        A new tensor of the same shape. Others may hold views of `x`.
    """
    x = x.unflatten(0, (chunks, -1)).clone()
    own, reference = x[:, 1:, :, first:last], x[:, :1, :, first:last]
    x[:, 1:, :, first:last] = reference if weight == 1 else torch.lerp(own, reference, weight)
    return x.flatten(0, 1)


@dataclass(frozen=True)
class Injection:
    """The blocks, strength and window of an injection, which all hooks share."""

    blocks: frozenset[tuple[str, int]]
    weight: float
    window: Window

    def __call__(self, _q: Tensor, k: Tensor, v: Tensor, *, extra_options: dict, **_more) -> dict:
        """ComfyUI's `attn1_patch`: change keys and values before the rotary embedding.

        All rows have the same positions, so it makes no difference on which side of it they change.
        """
        if (extra_options["block_type"], extra_options["block_index"]) not in self.blocks:
            return {}
        first, last = extra_options.get(TOKENS, extra_options["img_slice"])
        k, v = self.inject(k, v, extra_options, first, last)
        return {"k": k, "v": v}

    def inject(self, k: Tensor, v: Tensor, options: dict, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer after the injection, "B H N D" each."""
        chunks = len(options.get("cond_or_uncond", [0]))
        if not self.window.holds(options) or k.shape[0] // chunks < 2:
            return k, v
        k = inject_from_first_row(k, self.weight, chunks, first, last)
        return k, inject_from_first_row(v, self.weight, chunks, first, last)

    def attend(self, previous: Callable | None, options: dict) -> Callable:
        """An attention function that injects, then calls the one that was there before."""

        def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs):
            k, v = self.inject(k, v, options, *options[TOKENS])
            return previous(func, q, k, v, *args, **kwargs) if previous else func(q, k, v, *args, **kwargs)

        return attention


def add_injection(model: Any, layers: tuple[int, ...], weight: float, window: Window) -> None:
    """Make a patched model inject in these layers.

    Cores that call `attn1_patch` in the model's blocks get one. Older cores get a replacement of each block
    that runs the block with another attention function.

    Args:
        model: A clone of a model patcher.
        layers: Global layer numbers.
        weight: How far keys and values move to the reference's, 0..1.
        window: When.

    Raises:
        ValueError: The model lacks one of the layers.
    """
    num_double, num_single = count_blocks(model)
    check_layers(layers, num_double + num_single)
    injection = Injection(frozenset(block_of(layer, num_double) for layer in layers), weight, window)
    model.add_wrapper_with_key("diffusion_model", "stable_flow", count_tokens)
    if calls_attn1_patch(model):
        model.set_model_attn1_patch(injection)
        return

    def run(args: dict, original: Callable) -> dict:
        options = args["transformer_options"]
        attention = injection.attend(options.get("optimized_attention_override"), options)
        return original(
            {**args, "transformer_options": {**options, "optimized_attention_override": attention}}
        )

    for kind, index in injection.blocks:
        replace_block(model, kind, index, run)


def add_skip(model: Any, layers: tuple[int, ...], window: Window) -> None:
    """Make a patched model skip these layers: each passes on what it was given.

    Raises:
        ValueError: The model lacks one of the layers.
    """
    num_double, num_single = count_blocks(model)
    check_layers(layers, num_double + num_single)

    def run(args: dict, original: Callable) -> dict:
        return args if window.holds(args["transformer_options"]) else original(args)

    for layer in layers:
        replace_block(model, *block_of(layer, num_double), run)


def replace_block(model: Any, kind: str, index: int, run: Callable[[dict, Callable], dict]) -> None:
    """Put `run` around one block, and around what already replaces it.

    ComfyUI keeps one replacement a block, so the one that is there has to be called from the new one.
    """
    options = model.model_options["transformer_options"]
    key = (f"{kind}_block", index)
    previous = options.get("patches_replace", {}).get("dit", {}).get(key)

    def replacement(args: dict, extra: dict) -> dict:
        def original(changed: dict) -> dict:
            return previous(changed, extra) if previous else extra["original_block"](changed)

        return run(args, original)

    model.set_model_patch_replace(replacement, "dit", *key)


def hold_rows(model: Any, source: Tensor | None, mask: Tensor | None) -> None:
    """Hold the reference to an image, and the edits outside a mask to the reference.

    The sampler is told that the predicted image of row 0 is the given one. Row 0 then goes straight from the
    noise to it, and its keys and values are those of that image. Outside the mask, the prediction of the
    edits is that of row 0.

    Args:
        model: A clone of a model patcher.
        source: Latent of the image, "1 C h w", as the model's own space has it. If None, nothing holds row 0.
        mask: What the edits may change, "1 1 H W" in 0..1 at any size. If None, everything.
    """

    def hold(args: dict) -> Tensor:
        denoised = args["denoised"]
        reference, edits = denoised[:1], denoised[1:]
        if source is not None:
            if source.shape[1:] != reference.shape[1:]:
                raise ValueError(
                    f"Got a photograph's latent of {tuple(source.shape[1:])} and images of "
                    f"{tuple(reference.shape[1:])}: connect the same latent to both nodes"
                )
            reference = source.to(denoised)
        if mask is not None:
            weight = interpolate(mask.to(denoised), size=denoised.shape[-2:], mode="area")
            edits = torch.lerp(reference.expand_as(edits), edits, weight)
        return torch.cat((reference, edits))

    model.set_model_sampler_post_cfg_function(hold)


def count_tokens(executor: Callable, x: Tensor, timestep: Tensor, context: Tensor, *args, **kwargs):
    """Tell the hooks which tokens are the image's: a wrapper around the diffusion model.

    Tokens of context images come after those of the image. They are left alone.
    """
    patch = getattr(executor.class_obj, "patch_size", 2)
    height, width = x.shape[-2:]
    tokens = context.shape[1], context.shape[1] + -(-height // patch) * -(-width // patch)

    def told(value: Any) -> Any:
        is_options = isinstance(value, dict) and "sigmas" in value
        return {**value, TOKENS: tokens} if is_options else value

    args = tuple(told(value) for value in args)
    return executor(x, timestep, context, *args, **{name: told(value) for name, value in kwargs.items()})


def count_blocks(model: Any) -> tuple[int, int]:
    """Count the double-stream and single-stream blocks of a model.

    Raises:
        ValueError: The model is no transformer of FLUX's kind.
    """
    net = model.model.diffusion_model
    double = getattr(net, "double_blocks", None) or getattr(net, "transformer_blocks", None)
    if double is None:
        raise ValueError(
            f"Got a {type(net).__name__}, which has no double-stream blocks: connect a FLUX model"
        )
    return len(double), len(getattr(net, "single_blocks", ()))


def calls_attn1_patch(model: Any) -> bool:
    """Whether this core calls `attn1_patch` in the blocks of this model."""
    net = model.model.diffusion_model
    blocks = getattr(net, "double_blocks", None) or net.transformer_blocks
    try:
        return "attn1_patch" in inspect.getsource(sys.modules[type(blocks[0]).__module__])
    except (OSError, TypeError):  # no source to read: the replacement of blocks works everywhere
        return False
