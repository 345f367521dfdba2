"""The transformer of FLUX.1: from a noisy packed latent, a text and a noise level to a velocity."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux.intervention import NOTHING, Intervention, bypassed
from flux.math import KeysValues
from flux.modules import layers


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


class Flux(nn.Module):
    """The rectified-flow transformer. Layers are numbered 0.. over both stacks, double-stream blocks first."""

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

    def compile_blocks(self) -> None:
        """Compiles each block by itself, so that which layers are bypassed or injected never recompiles
        anything.
        """
        for block in (*self.double_blocks, *self.single_blocks):
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
    ) -> tuple[Tensor, dict[int, KeysValues]]:
        """The velocity, and the image keys and values of the layers that the intervention keeps.

        Args:
            img: packed latent, "B I channels".
            img_ids: position of each image token, "B I 3"; txt_ids the same for text, "B T 3".
            txt: T5 features, "B T features".
            timesteps: noise level 0..1 of each row, "B".
            y: pooled CLIP features, "B features".
            guidance: distilled guidance scale of each row, "B"; needed by models with `guidance_embed`.

        Raises:
            ValueError: tensors of another rank, or no guidance where the model needs one.
            InputError: an intervention that does not fit the model or the batch.
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(
                f"Input img and txt tensors must have 3 dimensions, got {img.ndim} and {txt.ndim}"
            )
        batch, num_txt = img.shape[0], txt.shape[1]
        intervention.check(self.num_layers, batch)
        skip_rows = intervention.skip_rows()
        kept = {}

        vec = self.time_in(layers.timestep_embedding(timesteps, 256)) + self.vector_in(y)
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("This model is guidance-distilled: give a guidance scale for each row")
            vec = vec + self.guidance_in(layers.timestep_embedding(guidance, 256))
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))

        for layer, block in enumerate(self.double_blocks):
            skip = bypassed(skip_rows, layer, img.device)
            if skip is True:
                continue
            given = intervention.given(layer, batch)
            if layer in intervention.keep:
                new_img, new_txt, kept[layer] = block(img, txt, vec, pe, given, keep=True)
            else:
                new_img, new_txt = block(img, txt, vec, pe, given)
            img = new_img if skip is False else torch.where(skip, img, new_img)
            txt = new_txt if skip is False else torch.where(skip, txt, new_txt)

        x = torch.cat((txt, img), dim=1)
        for layer, block in enumerate(self.single_blocks, start=len(self.double_blocks)):
            skip = bypassed(skip_rows, layer, img.device)
            if skip is True:
                continue
            given = intervention.given(layer, batch)
            if layer in intervention.keep:
                new_x, kept[layer] = block(x, vec, pe, given, keep=True, num_txt=num_txt)
            else:
                new_x = block(x, vec, pe, given, num_txt=num_txt)
            x = new_x if skip is False else torch.where(skip, x, new_x)

        return self.final_layer(x[:, num_txt:], vec), kept
