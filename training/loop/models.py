"""The models of flux-nano, untrained: classes of this package and of transformers at small sizes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoderParams
from flux.modules.layers import Modulation
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTextModel, Dinov2Model, T5EncoderModel

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Sizes:
    """The sizes of all models."""

    flux: FluxParams
    ae: AutoEncoderParams
    t5_layers: int
    t5_hidden: int
    clip_layers: int
    dino_width: int
    dino_layers: int
    lora_rank: int
    measuring_width: int


NANO = Sizes(
    FluxParams(
        in_channels=64, out_channels=64, vec_in_dim=128, context_in_dim=256, hidden_size=320, mlp_ratio=4.0,
        num_heads=5, depth=5, depth_single_blocks=10, axes_dim=[8, 28, 28], theta=10_000, qkv_bias=True,
        guidance_embed=False,
    ),
    AutoEncoderParams(
        resolution=256, in_channels=3, ch=32, out_ch=3, ch_mult=[1, 2, 4, 4], num_res_blocks=1, z_channels=16,
        scale_factor=0.3611, shift_factor=0.1159, num_groups=16,
    ),
    t5_layers=3, t5_hidden=512, clip_layers=2, dino_width=128, dino_layers=8, lora_rank=16,
    measuring_width=24,
)  # fmt: skip
TOY = Sizes(
    replace(
        NANO.flux, hidden_size=64, num_heads=1, depth=1, depth_single_blocks=2, context_in_dim=32,
        vec_in_dim=32,
    ),
    replace(NANO.ae, ch=8, num_groups=4),
    t5_layers=1, t5_hidden=64, clip_layers=1, dino_width=32, dino_layers=1, lora_rank=4, measuring_width=16,
)  # fmt: skip


def build_flux(params: FluxParams) -> Flux:
    """Build a transformer that starts as the zero function.

    Its gates and its last layer are zero, as in DiT (arXiv 2212.09748).
    """
    flux = Flux(params)
    for module in flux.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in flux.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
    for embedder in (flux.time_in, flux.vector_in):
        nn.init.normal_(embedder.in_layer.weight, std=0.02)
        nn.init.normal_(embedder.out_layer.weight, std=0.02)
    nn.init.zeros_(flux.final_layer.adaLN_modulation.get_parameter("1.weight"))
    nn.init.zeros_(flux.final_layer.linear.weight)
    return flux


class Generator(nn.Module):
    """The flow transformer with its text encoders, which are trained as one model."""

    def __init__(self, sizes: Sizes, tokenizers: Path, guidance: bool = False):
        super().__init__()
        self.flux = build_flux(replace(sizes.flux, guidance_embed=guidance))
        self.t5 = build_t5(sizes, tokenizers / "tokenizer_2")
        self.clip = build_clip(sizes, tokenizers / "tokenizer")

    def text(self, t5_tokens: Tensor, clip_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids `B T` to T5's features `B T C` and CLIP's pooled ones `B C`.

        Padding is not masked, as in FLUX.1.
        """
        txt = self.t5(input_ids=t5_tokens).last_hidden_state
        return txt, self.clip(input_ids=clip_tokens).pooler_output


def build_t5(sizes: Sizes, tokenizer: Path) -> "T5EncoderModel":
    """Build a T5 encoder for the tokenizer's words."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    width = sizes.flux.context_in_dim
    heads = max(1, width // 64)
    config = T5Config(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)),
        d_model=width, d_kv=width // heads, num_heads=heads, d_ff=sizes.t5_hidden, num_layers=sizes.t5_layers,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", relative_attention_max_distance=64,
        pad_token_id=0, eos_token_id=1, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_clip(sizes: Sizes, tokenizer: Path) -> "CLIPTextModel":
    """Build a CLIP text encoder for the tokenizer's words."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    width = sizes.flux.vec_in_dim
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=sizes.clip_layers, num_attention_heads=max(1, width // 64),
        max_position_embeddings=CLIP_LENGTH,
        # The pooled output is read where this token stands.
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def load_text_encoders(generator: Generator, folder: Path) -> None:
    """Load the text encoders that were exported to `folder`."""
    from transformers import CLIPTextModel, T5EncoderModel

    for encoder, kind, name in (
        (generator.t5, T5EncoderModel, "text_encoder_2"),
        (generator.clip, CLIPTextModel, "text_encoder"),
    ):
        encoder.load_state_dict(kind.from_pretrained(folder / name).float().state_dict())


DINO_SIDE, DINO_PATCH = 128, 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_dinov2(sizes: Sizes) -> "Dinov2Model":
    """Build the perceptual encoder."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=sizes.dino_width, num_hidden_layers=sizes.dino_layers,
        num_attention_heads=sizes.dino_width // 32,
        mlp_ratio=4, image_size=DINO_SIDE, patch_size=DINO_PATCH,
    )  # fmt: skip
    return Dinov2Model(config)


def channels_last(model: M) -> M:
    """Lay out a convolutional model's weights, in place, as GPUs compute fastest with them."""
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # missing in torch's hints


def compile_blocks(flux: Flux) -> None:
    """Compile each block. A stage has one batch size, since another one would compile all again."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    flux.compile_blocks()


def text_ids(device: torch.device) -> Tensor:
    """Positions of the text tokens, `1 T 3`, for any batch."""
    return torch.zeros(1, T5_LENGTH, 3, device=device)
