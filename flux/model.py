"""The transformer of FLUX.1: from a noisy packed latent, a text and a noise level to a velocity."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

from flux.intervention import NOTHING, Findings, Intervention
from flux.math import Exchange
from flux.modules import layers, ops
from flux.modules.step_cache import StepCache


@dataclass(frozen=True)
class FluxParams:
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
    def around_the_joint(self) -> frozenset[int]:
        """The two layers on either side of where the streams join: what the tokens stand for is settled
        there.
        """
        first, last = max(0, self.depth - 2), self.depth + min(2, self.depth_single_blocks)
        return frozenset(range(first, last))


@dataclass(frozen=True, eq=False)
class Streams:
    """Both streams between two layers, on their way into `layer`: img "B I C", txt "B T C"."""

    layer: int
    img: Tensor
    txt: Tensor

    def expanded(self, batch: int) -> "Streams":
        """A single row made to serve the whole batch."""
        return Streams(self.layer, self.img.expand(batch, -1, -1), self.txt.expand(batch, -1, -1))

    def stacked(self, other: "Streams", batch: int) -> "Streams":
        """These streams and another pass's, each brought to the batch's number of rows, as one batch."""
        one, two = self.expanded(batch), other.expanded(batch)
        return Streams(self.layer, torch.cat((one.img, two.img)), torch.cat((one.txt, two.txt)))


HOPPER = 9  # CUDA compute capability, its first number
PACKAGES = ("quack", "flash_attn")


def with_epilogues(device: torch.device) -> ModuleType | None:
    """`flux.modules.projections_hopper`, where its kernels run: on a Hopper card, its packages installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    if not all(find_spec(name) for name in PACKAGES):
        return None
    try:
        from flux.modules import projections_hopper
    except Exception as error:  # whatever young packages stumble over
        line = f"quack-kernels and flash-attn-4 do not start ({error}): torch compiles the blocks instead"
        warnings.warn(line, stacklevel=2)
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
    def num_layers(self) -> int:
        return len(self.double_blocks) + len(self.single_blocks)

    def compile_blocks(self, device: torch.device | str | None = None) -> None:
        """Makes each block faster by itself, so that which layers are bypassed or injected never changes
        anything: by products that do what follows them (`flux.modules.projections_hopper`) where those are to be had,
        otherwise by torch's compiler.

        Args:
            device: what the blocks compute on; None: where they are.
        """
        # One graph for each kind of pass (plain, keeping, taking) and each new shape: the default of 8 is
        # soon used up, and the next would be an error.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        ops.prepare_compiling()
        hopper = with_epilogues(torch.device(device or self.img_in.weight.device))
        for block in (*self.double_blocks, *self.single_blocks):
            if hopper and hopper.serves(block):
                block.products = hopper.Joined
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
        """The velocity of `observe` alone, "B I channels"."""
        return self.observe(img, img_ids, txt, txt_ids, timesteps, y, guidance, intervention)[0]

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
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Findings]:
        """The velocity, and what the intervention keeps and watches.

        Args:
            img: packed latent, "B I channels".
            img_ids: position of each image token, "B I 3"; txt_ids the same for text, "B T 3".
            txt: T5 features, "B T features".
            timesteps: noise level 0..1 of each row, "B".
            y: pooled CLIP features, "B features".
            guidance: distilled guidance scale of each row, "B"; needed by models with `guidance_embed`.
            start: begin with these streams at their layer, the layers before it not computed. Their rows, B
                or 1, must be what those layers make of the same inputs.
            mods: what `modulations` made of the same noise levels, y and guidance, of B rows or 1; None: made
                layer by layer.
            cache: spares a plain pass its layers after the first where that changes little.
            exchange: for tokens that are a share of all, see `flux.runtime.parallel`.

        Raises:
            ValueError: tensors of another rank, or no guidance where the model needs one.
            InputError: an intervention that does not fit the model or the batch.
        """
        streams, vec, pe, mods = self._embed(img, img_ids, txt, txt_ids, timesteps, y, guidance, mods)
        intervention.check(self.num_layers, *img.shape[:2])
        if start is not None:
            streams = start.expanded(img.shape[0])
        findings = Findings()
        passing = self._layers(streams, vec, pe, intervention, findings, mods, exchange)
        if cache is None or start is not None or not intervention.is_plain:
            for streams in passing:
                pass
            return self.final_layer(streams.img, vec, mods[-1]), findings
        after_first = next(passing).img
        first = after_first - streams.img
        rest = cache.rest(first)
        if rest is not None:
            return self.final_layer(after_first + rest, vec, mods[-1]), findings
        for streams in passing:
            pass
        cache.remember(first, streams.img - after_first)
        return self.final_layer(streams.img, vec, mods[-1]), findings

    def modulations(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        """The modulation of each layer and of the last one, "B 12C", "B 3C" or "B 2C", for any rows, those
        of a whole schedule for instance: a quarter of all weights is then read once and not at every step.

        At full size a row has 2.1 MB in bfloat16.
        """
        vec = self._conditioning(timesteps, y, guidance)
        parts = (*self.double_blocks, *self.single_blocks, self.final_layer)
        return [part.modulate(vec) for part in parts]

    def streams(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mods: Sequence[Tensor] | None = None,
    ) -> list[Streams]:
        """Both streams on their way into each layer, as `observe` takes them for a start."""
        streams, vec, pe, mods = self._embed(img, img_ids, txt, txt_ids, timesteps, y, guidance, mods)
        return [streams, *self._layers(streams, vec, pe, NOTHING, Findings(), mods)][: self.num_layers]

    def _embed(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None,
        mods: Sequence[Tensor] | None,
    ) -> tuple[Streams, Tensor | None, Tensor, Sequence[Tensor | None]]:
        """The streams into layer 0, the vector that modulations are made of ("B C"; None with all of them
        given), the rotations of all positions, and each layer's modulation, as far as it is given.
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(
                f"Input img and txt tensors must have 3 dimensions, got {img.ndim} and {txt.ndim}"
            )
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        vec = None if mods else self._conditioning(timesteps, y, guidance)
        mods = mods or [None] * (self.num_layers + 1)
        return Streams(0, self.img_in(img), self.txt_in(txt)), vec, pe, mods

    def _conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that all modulations are made of, "B C"."""
        vec = self.time_in(layers.timestep_embedding(timesteps, 256)) + self.vector_in(y)
        if not self.params.guidance_embed:
            return vec
        if guidance is None:
            raise ValueError("This model is guidance-distilled: give a guidance scale for each row")
        return vec + self.guidance_in(layers.timestep_embedding(guidance, 256))

    def _layers(
        self,
        streams: Streams,
        vec: Tensor | None,
        pe: Tensor,
        intervention: Intervention,
        findings: Findings,
        mods: Sequence[Tensor | None],
        exchange: Exchange | None = None,
    ) -> Iterator[Streams]:
        """Yields the streams out of each layer, from the one that `streams` enters; fills `findings`."""
        img, txt = streams.img, streams.txt
        batch, num_txt, num_double = img.shape[0], txt.shape[1], len(self.double_blocks)

        for layer in range(streams.layer, num_double):
            bypass = intervention.bypass(layer, img.device)
            if not bypass.whole:
                block, (given, weight) = self.double_blocks[layer], intervention.given(layer, batch)
                more = {"weight": weight, "mod": mods[layer], "exchange": exchange}
                if intervention.looks_into(layer):
                    new_img, new_txt, heads = block(img, txt, vec, pe, given, keep=True, **more)
                    findings.add(intervention, layer, num_txt, *heads)
                else:
                    new_img, new_txt = block(img, txt, vec, pe, given, **more)
                img, txt = bypass.of(img, new_img), bypass.of(txt, new_txt)
            yield Streams(layer + 1, img, txt)

        x = torch.cat((txt, img), dim=1)
        for layer in range(max(streams.layer, num_double), self.num_layers):
            bypass = intervention.bypass(layer, img.device)
            if not bypass.whole:
                block = self.single_blocks[layer - num_double]
                given, weight = intervention.given(layer, batch)
                more = {"num_txt": num_txt, "weight": weight, "mod": mods[layer], "exchange": exchange}
                if intervention.looks_into(layer):
                    new_x, heads = block(x, vec, pe, given, keep=True, **more)
                    findings.add(intervention, layer, num_txt, *heads)
                else:
                    new_x = block(x, vec, pe, given, **more)
                x = bypass.of(x, new_x)
            yield Streams(layer + 1, x[:, num_txt:], x[:, :num_txt])
