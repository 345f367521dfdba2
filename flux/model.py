"""The transformer of FLUX.1: from a noisy packed latent, a text and a noise level to a velocity."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from flux.errors import warn
from flux.inputs import Inputs, Streams
from flux.intervention import NOTHING, Intervention, Recorded
from flux.math import AttentionEdit, Exchange
from flux.modules import layers, ops
from flux.modules.lora import LinearLora, replace_linear_with_lora
from flux.modules.step_cache import StepCache


@dataclass(frozen=True)
class FluxParams:
    """The sizes of a transformer, as upstream names them.

    Attributes:
        in_channels: Channels of an image token that goes in.
        out_channels: Channels of an image token that comes out.
        vec_in_dim: CLIP features.
        context_in_dim: T5 features of a token.
        hidden_size: Width of the streams, C.
        mlp_ratio: Hidden channels of an MLP, relative to the width.
        num_heads: Heads of each attention, H.
        depth: Number of double-stream blocks.
        depth_single_blocks: Number of single-stream blocks.
        axes_dim: Channels of a head that each axis of the positions rotates.
        theta: Base of the rotary embedding's frequencies.
        qkv_bias: Whether the double blocks' projections to queries, keys and values have a bias.
        guidance_embed: Whether the model takes a distilled guidance scale.
    """

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list[int]
    theta: int
    qkv_bias: bool
    guidance_embed: bool

    @property
    def junction_layers(self) -> frozenset[int]:
        """The last two double and the first two single blocks, where token semantics are most stable."""
        first, last = max(0, self.depth - 2), self.depth + min(2, self.depth_single_blocks)
        return frozenset(range(first, last))


class VelocityModel(Protocol):
    """The transformer as samplers use it: `Flux`, or `flux.runtime.parallel.SequenceParallelFlux`."""

    def observe(
        self,
        inputs: Inputs,
        intervention: Intervention = NOTHING,
        *,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Recorded]:
        """The velocity, and what the intervention keeps and watches."""
        ...

    def streams(self, inputs: Inputs, mods: Sequence[Tensor] | None = None) -> list[Streams]:
        """Both streams on their way into each layer."""
        ...

    def modulations(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        """The modulations of each layer and of the last one."""
        ...


HOPPER = 9  # first number of the CUDA compute capability
HOPPER_PACKAGES = ("quack", "flash_attn")


def hopper_kernels(device: torch.device) -> ModuleType | None:
    """`flux.modules.projections_hopper`, if the device is a Hopper GPU and the packages are installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    if not all(find_spec(name) for name in HOPPER_PACKAGES):
        return None
    try:
        from flux.modules import projections_hopper
    except Exception as error:  # young packages may fail in any way
        warn(f"quack-kernels and flash-attn-4 do not start ({error}): torch compiles the blocks instead")
        return None
    return projections_hopper


class Flux(nn.Module):
    """The rectified-flow transformer. Layers are numbered over both stacks, double-stream blocks first."""

    def __init__(self, params: FluxParams):
        super().__init__()
        head_size, rest = divmod(params.hidden_size, params.num_heads)
        if rest:
            raise ValueError(
                f"Hidden size {params.hidden_size} must be divisible by num_heads {params.num_heads}"
            )
        if sum(params.axes_dim) != head_size:
            raise ValueError(
                f"Got axes {params.axes_dim}, expected their sum to be the head size {head_size}"
            )

        self.params = params
        self.in_channels = params.in_channels
        self.out_channels = params.out_channels
        self.hidden_size = params.hidden_size
        self.num_heads = params.num_heads
        width = params.hidden_size

        self.pe_embedder = layers.EmbedND(head_size, params.theta, params.axes_dim)
        self.img_in = nn.Linear(params.in_channels, width)
        self.time_in = layers.MLPEmbedder(256, width)
        self.vector_in = layers.MLPEmbedder(params.vec_in_dim, width)
        self.guidance_in = layers.MLPEmbedder(256, width) if params.guidance_embed else nn.Identity()
        self.txt_in = nn.Linear(params.context_in_dim, width)
        self.double_blocks = nn.ModuleList(
            layers.DoubleStreamBlock(width, params.num_heads, params.mlp_ratio, params.qkv_bias)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            layers.SingleStreamBlock(width, params.num_heads, params.mlp_ratio)
            for _ in range(params.depth_single_blocks)
        )
        self.final_layer = layers.LastLayer(width, 1, params.out_channels)

    @property
    def blocks(self) -> list[layers.DoubleStreamBlock | layers.SingleStreamBlock]:
        """All blocks, in the order of their layer numbers."""
        # nn.ModuleList does not tell the type of its modules.
        stacks = [*self.double_blocks, *self.single_blocks]
        return cast(list[layers.DoubleStreamBlock | layers.SingleStreamBlock], stacks)

    @property
    def num_layers(self) -> int:
        """The number of blocks of both kinds."""
        return len(self.double_blocks) + len(self.single_blocks)

    def compile_blocks(self, device: torch.device | str | None = None) -> None:
        """Make each block faster by itself, so that any layer can be skipped or injected without recompiling.

        Hopper GPUs get blocks with fused kernels (`flux.modules.projections_hopper`), if the packages are
        installed and serve the block. All others are compiled by torch.

        Args:
            device: Device on which the blocks compute. If None, the one they are on.
        """
        # One graph for each kind of pass (plain, recording, injecting) and each new shape: the default of 8
        # is soon used up, and the next would be an error.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        ops.prepare_compiling()
        hopper = hopper_kernels(torch.device(device or self.img_in.weight.device))
        for block in self.blocks:
            if hopper and hopper.serves(block):
                hopper.use_hopper(block)
            else:
                block.compile(fullgraph=True)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        intervention: Intervention = NOTHING,
    ) -> Tensor:
        """The velocity alone, "B I channels", as upstream calls it: see `observe`."""
        return self.observe(Inputs(img, img_ids, txt, txt_ids, timesteps, y, guidance), intervention)[0]

    def observe(
        self,
        inputs: Inputs,
        intervention: Intervention = NOTHING,
        *,
        start: Streams | None = None,
        mods: Sequence[Tensor] | None = None,
        cache: StepCache | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Recorded]:
        """The velocity, "B I channels", and what the intervention keeps and watches.

        Args:
            inputs: Latent, text and conditioning.
            intervention: Layers to skip, keep, watch or inject.
            start: Streams to begin with at their layer, B rows or 1; the layers before are not computed. They
                must be what those layers make of the same inputs.
            mods: What `modulations` returned for the same noise levels, y and guidance, of B rows or 1. If
                None, each layer's modulations are computed when they are needed.
            cache: Spares a plain pass its layers after the first where these change little.
            exchange: Gathers keys and values, if processes share the tokens: see `flux.runtime.parallel`.

        Raises:
            ValueError: The model needs a guidance scale and got none.
            InputError: The intervention does not fit the model or the batch.
        """
        batch, num_img = inputs.img.shape[:2]
        inputs.check(self.in_channels)
        intervention.check(self.num_layers, batch, num_img, inputs.counts.context)
        first_layer = 0 if start is None else start.layer
        if not intervention.needs_context(range(first_layer, self.num_layers)):
            inputs = replace(inputs, condition=inputs.condition.without_context())
            start = start and start.cut(num_img)
        free = intervention.free
        if free is not None:
            inputs, intervention = inputs.at_tokens(free.computed), intervention.at_tokens(free.computed)
        modulation = self._modulation(inputs) if mods is None else mods.__getitem__
        streams = self._embed(inputs) if start is None else start.expanded(batch)
        recorded = Recorded()
        passing = self._layers(inputs, streams, modulation, intervention, recorded, exchange)
        if start is not None or not intervention.is_plain:
            cache = None
        img = _last_image(streams, passing, inputs.img.shape[1], cache)
        velocity = self.final_layer(img, mod=modulation(self.num_layers))
        return velocity if free is None else free.in_place(velocity, num_img), recorded

    def streams(
        self, inputs: Inputs, mods: Sequence[Tensor] | None = None, exchange: Exchange | None = None
    ) -> list[Streams]:
        """Both streams on their way into each layer of a plain pass, as `observe` takes them for a start."""
        modulation = self._modulation(inputs) if mods is None else mods.__getitem__
        first = self._embed(inputs)
        passing = self._layers(inputs, first, modulation, NOTHING, Recorded(), exchange)
        return [first, *passing][: self.num_layers]

    def modulations(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        """The modulations of each layer and of the last one, "B 12C", "B 3C" or "B 2C".

        With the rows of a whole schedule, a quarter of all weights is read once and not in every step. At
        full size, a row has 2.1 MB in bfloat16.
        """
        vec = self._conditioning(timesteps, y, guidance)
        return [part.modulate(vec) for part in (*self.blocks, self.final_layer)]

    def _modulation(self, inputs: Inputs) -> Callable[[int], Tensor]:
        """A function that computes the modulations of one layer, or of the last one by the number after."""
        vec = self._conditioning(inputs.timesteps, inputs.y, inputs.guidance)
        parts = (*self.blocks, self.final_layer)
        return lambda layer: parts[layer].modulate(vec)

    def _conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that all modulations are made of, "B C"."""
        vec = self.time_in(layers.timestep_embedding(timesteps, 256)) + self.vector_in(y)
        if not self.params.guidance_embed:
            return vec
        if guidance is None:
            raise ValueError("This model is guidance-distilled: give a guidance scale for each row")
        return vec + self.guidance_in(layers.timestep_embedding(guidance, 256))

    def _embed(self, inputs: Inputs) -> Streams:
        """The streams into layer 0."""
        return Streams(0, self.img_in(inputs.img_in), self.txt_in(inputs.txt_in))

    @staticmethod
    def _plain_edit(inputs: Inputs, exchange: Exchange | None) -> AttentionEdit:
        """The part of each layer's attention edit that is the same in all layers."""
        strength = None
        if inputs.condition.context_strength != 1:
            # A tensor, since compiled blocks would be compiled anew for each number.
            strength = inputs.img.new_full((1, 1, 1, 1), inputs.condition.context_strength)
        return AttentionEdit(exchange=exchange, num_context=inputs.counts.context, context_strength=strength)

    def _layers(
        self,
        inputs: Inputs,
        streams: Streams,
        modulation: Callable[[int], Tensor],
        intervention: Intervention,
        recorded: Recorded,
        exchange: Exchange | None = None,
    ) -> Iterator[Streams]:
        """Yield the streams out of each layer, from the one that `streams` enter; fill `recorded`."""
        img, txt, counts = streams.img, streams.txt, inputs.counts
        plain, pe = self._plain_edit(inputs, exchange), self.pe_embedder(inputs.ids)
        batch, num_txt, num_double = img.shape[0], txt.shape[1], len(self.double_blocks)

        # nn.ModuleList does not tell the type of its modules.
        double_blocks = cast(Sequence[layers.DoubleStreamBlock], self.double_blocks)
        single_blocks = cast(Sequence[layers.SingleStreamBlock], self.single_blocks)

        for layer in range(streams.layer, num_double):
            skip = intervention.skip_at(layer, img.device)
            if not skip.everywhere:
                edit = intervention.edit_at(layer, batch, plain)
                new_img, new_txt, qkv = double_blocks[layer].run(img, txt, modulation(layer), pe, edit)
                recorded.add(intervention, layer, counts, qkv)
                img, txt = skip.apply(img, new_img), skip.apply(txt, new_txt)
            yield Streams(layer + 1, img, txt)

        x = torch.cat((txt, img), dim=1)
        for layer in range(max(streams.layer, num_double), self.num_layers):
            skip = intervention.skip_at(layer, x.device)
            if not skip.everywhere:
                edit = intervention.edit_at(layer, batch, plain)
                new_x, qkv = single_blocks[layer - num_double].run(x, modulation(layer), pe, num_txt, edit)
                recorded.add(intervention, layer, counts, qkv)
                x = skip.apply(x, new_x)
            yield Streams(layer + 1, x[:, num_txt:], x[:, :num_txt])


def _last_image(first: Streams, passing: Iterator[Streams], num_img: int, cache: StepCache | None) -> Tensor:
    """Compute the layers, and return the noise tokens out of the last one, "B I C".

    The context tokens behind them have no velocity.
    """
    images = (streams.img[:, :num_img] for streams in passing)
    img = first.img[:, :num_img]
    if cache is not None:
        return cache.image_out(img, images)
    for img in images:  # noqa: B007  (only the last one matters)
        pass
    return img


class FluxLoraWrapper(Flux):
    """The transformer with a low-rank change beside each linear layer, as in upstream's control LoRAs.

    All further arguments are those of `Flux`.

    Args:
        lora_rank: Largest rank of a change.
        lora_scale: Strength of the changes.
    """

    def __init__(self, lora_rank: int = 128, lora_scale: float = 1.0, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_rank = lora_rank
        replace_linear_with_lora(self, lora_rank, lora_scale)

    def set_lora_scale(self, scale: float) -> None:
        """Set the strength of all changes."""
        for module in self.modules():
            if isinstance(module, LinearLora):
                module.set_scale(scale)
