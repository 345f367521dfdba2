"""Builds diffusers' models on the weights that a `Flux` holds, so that both fit on one GPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flux.inputs import Inputs
from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoderParams

# Our names and diffusers'. Several names on the right are the parts of one fused projection, in its rows'
# order.
EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "in_layer": "linear_1",
    "out_layer": "linear_2",
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}


def to_diffusers_names(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Rename a `Flux`'s state dict for diffusers. Only the last modulation is copied, all else is shared."""
    result = {}
    for name, tensor in weights.items():
        path, kind = name.rsplit(".", 1)
        stack, *rest = path.split(".", 2)
        if stack == "final_layer":
            if path.endswith("linear"):
                result[f"proj_out.{kind}"] = tensor
            else:  # shift and scale are swapped in diffusers
                result[f"norm_out.linear.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        elif rest and rest[0].isdigit():
            (index, part), table = rest, DOUBLE if stack == "double_blocks" else SINGLE
            prefix = "transformer_blocks" if stack == "double_blocks" else "single_transformer_blocks"
            sizes = [width] * (len(table[part]) - 1)
            parts = tensor.split([*sizes, tensor.shape[0] - sum(sizes)])
            for target, rows in zip(table[part], parts, strict=True):
                result[f"{prefix}.{index}.{target}.{'weight' if kind == 'scale' else kind}"] = rows
        else:
            result[".".join(EMBEDDERS[word] for word in path.split(".")) + f".{kind}"] = tensor
    return result


def diffusers_transformer(model: Flux) -> FluxTransformer2DModel:
    """Build diffusers' transformer of the same sizes, which shares the memory of the model's weights."""
    params: FluxParams = model.params
    sizes: dict[str, Any] = {
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": tuple(params.axes_dim),
    }
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**sizes)
    transformer.load_state_dict(to_diffusers_names(model.state_dict(), params.hidden_size), assign=True)
    return transformer.eval().requires_grad_(False)


def diffusers_step(transformer: FluxTransformer2DModel, inputs: Inputs) -> Callable[[], Tensor]:
    """Make a step of diffusers' transformer, with the tensors that its pipelines hand to it."""
    txt, num_img = inputs.txt_in, inputs.img.shape[1]
    txt_ids, img_ids = inputs.ids[0].split([txt.shape[1], inputs.img_in.shape[1]])
    arguments = {
        "encoder_hidden_states": txt,
        "pooled_projections": inputs.y,
        "timestep": inputs.timesteps,
        "guidance": None if inputs.guidance is None else inputs.guidance.float(),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }
    return lambda: transformer(inputs.img_in, **arguments, return_dict=False)[0][:, :num_img]


def diffusers_loss(transformer: nn.Module, inputs: Inputs, velocity: Tensor) -> Tensor:
    """Compute the loss of diffusers' transformer: the mean squared error to the true velocity, "B I 64"."""
    found = transformer(
        hidden_states=inputs.img,
        img_ids=inputs.img_ids[0],
        encoder_hidden_states=inputs.txt,
        txt_ids=inputs.txt_ids[0],
        timestep=inputs.timesteps,
        pooled_projections=inputs.y,
        guidance=inputs.guidance,
        return_dict=False,
    )[0]
    return F.mse_loss(found.float(), velocity)


def diffusers_pipeline(model: Flux, ae_params: AutoEncoderParams, dtype: torch.dtype) -> FluxPipeline:
    """Build diffusers' pipeline with a random autoencoder and no text encoders."""
    levels = len(ae_params.ch_mult)
    # Without types, since diffusers' hints allow for one level only.
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(ae_params.ch * mult for mult in ae_params.ch_mult),
        "layers_per_block": ae_params.num_res_blocks,
        "latent_channels": ae_params.z_channels,
        "norm_num_groups": ae_params.num_groups,
        "scaling_factor": ae_params.scale_factor,
        "shift_factor": ae_params.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device(next(model.parameters()).device):
        vae: Any = AutoencoderKL(**sizes)
    no_texts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.to(dtype).eval().requires_grad_(False),
        transformer=diffusers_transformer(model),
        **no_texts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
