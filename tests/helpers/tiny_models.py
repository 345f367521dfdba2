"""Small random models, their counterparts in diffusers, and a forward pass written out by hand."""

import math
import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoder
from flux.modules.layers import timestep_embedding
from flux.sampling import image_ids
from flux.specs import configs

NUM_DOUBLE, NUM_SINGLE = 3, 4
NUM_LAYERS = NUM_DOUBLE + NUM_SINGLE

PARAMS = replace(
    configs["flux-dev"].params,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    axes_dim=[4, 6, 6],
    depth=NUM_DOUBLE,
    depth_single_blocks=NUM_SINGLE,
)
AE_PARAMS = replace(configs["flux-dev"].ae_params, ch=8, num_groups=4)


def randomized(model: torch.nn.Module, seed: int):
    """Every parameter drawn anew, norms' scales around 1, so that no part of the model is idle."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith(".scale") or ("norm" in name and name.endswith(".weight"))
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data.copy_(1 + 0.2 * draw if is_scale else draw / math.sqrt(fan_in))
    return model.eval().requires_grad_(False)


def flux(seed: int = 0, **changes) -> Flux:
    """A random transformer of seven layers. Changes are to `PARAMS`."""
    return randomized(Flux(replace(PARAMS, **changes)), seed)


def autoencoder(seed: int = 0, **changes) -> AutoEncoder:
    """A random autoencoder. Changes are to `AE_PARAMS`."""
    return randomized(AutoEncoder(replace(AE_PARAMS, **changes)), seed)


def inputs(
    batch: int = 2,
    height: int = 64,
    width: int = 64,
    num_txt: int = 5,
    seed: int = 0,
    params: FluxParams = PARAMS,
) -> dict[str, Tensor]:
    """Arguments of `Flux.forward` for images of that size in pixels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = image_ids(batch, height, width, "cpu")
    return {
        "img": draw(batch, ids.shape[1], params.in_channels),
        "img_ids": ids,
        "txt": draw(batch, num_txt, params.context_in_dim),
        "txt_ids": torch.zeros(batch, num_txt, 3),
        "timesteps": torch.rand(batch, generator=generator),
        "y": draw(batch, params.vec_in_dim),
        "guidance": 1 + 3 * torch.rand(batch, generator=generator) if params.guidance_embed else None,
    }


def rows_of(tensors: dict[str, Tensor | None], rows) -> dict[str, Tensor | None]:
    """Some rows of `inputs`, by slice or list."""
    return {name: None if x is None else x[rows] for name, x in tensors.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


# ---- the transformer by hand: complex rotations, explicit softmax, layers one after the other


def hand_forward(
    model: Flux,
    given: dict[str, Tensor],
    inject: frozenset[int] = frozenset(),
    held: Tensor | None = None,
    num_context: int = 0,
    context_strength: float = 1.0,
    hidden: frozenset[int] = frozenset(),
    parts: str = "kv",
) -> Tensor:
    """The velocity, from the model's linear layers alone; in the layers of `inject` every row has row 0's
    image keys, values or queries, as `parts` says, written over its own before the rotation. In all layers,
    so do keys and values of the image tokens where `held` is true, "I". The last `num_context` image tokens
    are context: nothing is injected in them, their rotated keys are scaled about their mean, and they have no
    velocity. In the layers of `hidden` only they attend to themselves.
    """
    p = model.params
    img, txt = model.img_in(given["img"]), model.txt_in(given["txt"])
    vec = hand_vec(model, given)
    ids = torch.cat((given["txt_ids"], given["img_ids"]), dim=1)
    num_txt, end = txt.shape[1], ids.shape[1] - num_context

    def attention(qkv: Tensor, layer: int) -> Tensor:
        q, k, v = qkv
        if layer in inject:
            for part, x in zip("qkv", (q, k, v)):
                if part in parts:
                    x[:, :, num_txt:end] = x[:1, :, num_txt:end].clone()
        if held is not None:
            places = num_txt + held.nonzero()[:, 0]
            for x in (k, v):
                x[:, :, places] = x[:1, :, places].clone()
        q, k = (hand_rotation(x, ids, p) for x in (q, k))
        if num_context:
            mean = k[:, :, end:].mean(dim=2, keepdim=True)
            k[:, :, end:] = mean + context_strength * (k[:, :, end:] - mean)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if layer in hidden:
            scores[:, :, :end, end:] = -math.inf
        weights = torch.softmax(scores, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def heads(x: Tensor, norm) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.unflatten(-1, (3, p.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return hand_rms(q, norm.query_norm.scale), hand_rms(k, norm.key_norm.scale), v.clone()

    for layer, block in enumerate(model.double_blocks):
        mods = {
            s: getattr(block, f"{s}_mod").lin(F.silu(vec))[:, None].chunk(6, dim=-1) for s in ("txt", "img")
        }
        streams = {"txt": txt, "img": img}
        per_stream = []
        for name, x in streams.items():
            shift, scale, *_ = mods[name]
            attn = getattr(block, f"{name}_attn")
            per_stream.append(heads(attn.qkv(hand_norm(x) * (1 + scale) + shift), attn.norm))
        mixed = attention([torch.cat(parts, dim=2) for parts in zip(*per_stream)], layer)
        for name, part in (("txt", mixed[:, :num_txt]), ("img", mixed[:, num_txt:])):
            _, _, gate, shift2, scale2, gate2 = mods[name]
            x = streams[name] + gate * getattr(block, f"{name}_attn").proj(part)
            expand, _, contract = getattr(block, f"{name}_mlp")
            h = expand(hand_norm(x) * (1 + scale2) + shift2)
            streams[name] = x + gate2 * contract(F.gelu(h, approximate="tanh"))
        txt, img = streams["txt"], streams["img"]

    x = torch.cat((txt, img), dim=1)
    for layer, block in enumerate(model.single_blocks, start=p.depth):
        shift, scale, gate = block.modulation.lin(F.silu(vec))[:, None].chunk(3, dim=-1)
        h = block.linear1(hand_norm(x) * (1 + scale) + shift)
        qkv, mlp = h[..., : 3 * p.hidden_size], h[..., 3 * p.hidden_size :]
        mixed = attention(heads(qkv, block.norm), layer)
        x = x + gate * block.linear2(torch.cat((mixed, F.gelu(mlp, approximate="tanh")), dim=-1))

    shift, scale = model.final_layer.adaLN_modulation[1](F.silu(vec))[:, None].chunk(2, dim=-1)
    return model.final_layer.linear(hand_norm(x[:, num_txt:end]) * (1 + scale) + shift)


def hand_vec(model: Flux, given: dict[str, Tensor]) -> Tensor:
    # Angles of up to thousands of radians: only the very same embedding gives the same float32 numbers.
    vec = hand_mlp(model.time_in, timestep_embedding(given["timesteps"], 256)) + hand_mlp(
        model.vector_in, given["y"]
    )
    if model.params.guidance_embed:
        vec = vec + hand_mlp(model.guidance_in, timestep_embedding(given["guidance"], 256))
    return vec


def hand_mlp(mlp, x: Tensor) -> Tensor:
    return mlp.out_layer(F.silu(mlp.in_layer(x)))


def hand_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)


def hand_rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def hand_rotation(x: Tensor, ids: Tensor, p: FluxParams) -> Tensor:
    """Channel pairs as complex numbers, turned by position times frequency."""
    frequencies = [
        (axis, p.theta ** (-2 * j / size)) for axis, size in enumerate(p.axes_dim) for j in range(size // 2)
    ]
    angles = torch.stack([ids[..., axis].double() * f for axis, f in frequencies], dim=-1)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * turns
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


# ---- names and layouts of diffusers


# Parts of names, replaced in this order.
TRANSFORMER_NAMES = {
    "img_in.": "x_embedder.",
    "txt_in.": "context_embedder.",
    "time_in.": "time_text_embed.timestep_embedder.",
    "vector_in.": "time_text_embed.text_embedder.",
    "guidance_in.": "time_text_embed.guidance_embedder.",
    ".in_layer.": ".linear_1.",
    ".out_layer.": ".linear_2.",
    "double_blocks.": "transformer_blocks.",
    "single_blocks.": "single_transformer_blocks.",
    ".img_mod.lin.": ".norm1.linear.",
    ".txt_mod.lin.": ".norm1_context.linear.",
    ".modulation.lin.": ".norm.linear.",
    ".img_attn.proj.": ".attn.to_out.0.",
    ".txt_attn.proj.": ".attn.to_add_out.",
    ".img_attn.norm.query_norm.scale": ".attn.norm_q.weight",
    ".img_attn.norm.key_norm.scale": ".attn.norm_k.weight",
    ".txt_attn.norm.query_norm.scale": ".attn.norm_added_q.weight",
    ".txt_attn.norm.key_norm.scale": ".attn.norm_added_k.weight",
    ".norm.query_norm.scale": ".attn.norm_q.weight",
    ".norm.key_norm.scale": ".attn.norm_k.weight",
    ".img_mlp.0.": ".ff.net.0.proj.",
    ".img_mlp.2.": ".ff.net.2.",
    ".txt_mlp.0.": ".ff_context.net.0.proj.",
    ".txt_mlp.2.": ".ff_context.net.2.",
    ".linear2.": ".proj_out.",
    "final_layer.linear.": "proj_out.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def to_diffusers_transformer(weights: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """A state dict of `Flux` as one of diffusers' FluxTransformer2DModel."""
    mapped = {}
    for name, tensor in weights.items():
        fused = next((part for part in FUSED if f".{part}." in name), None)
        if name.startswith("final_layer.adaLN_modulation"):
            # Shift and scale stand in the other order there.
            tensor = torch.cat(tensor.chunk(2)[::-1])
        names, parts = [name], [tensor]
        if fused:
            names = [name.replace(fused, own) for own in FUSED[fused]]
            parts = tensor.split([hidden_size] * 3 + [len(tensor) - 3 * hidden_size] * (len(names) - 3))
        for own, part in zip(names, parts):
            for ours, theirs in TRANSFORMER_NAMES.items():
                own = own.replace(ours, theirs)
            mapped[own] = part
    return mapped


def ask_diffusers(model, given: dict[str, Tensor]) -> Tensor:
    """The velocity of a transformer of diffusers for arguments of `Flux.forward`."""
    return model(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        guidance=given["guidance"],
        img_ids=given["img_ids"][0],
        txt_ids=given["txt_ids"][0],
        return_dict=False,
    )[0]


def diffusers_transformer(model: Flux):
    """The same model in diffusers."""
    from diffusers import FluxTransformer2DModel

    p = model.params
    theirs = FluxTransformer2DModel(
        in_channels=p.in_channels,
        out_channels=p.out_channels,
        num_layers=p.depth,
        num_single_layers=p.depth_single_blocks,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_attention_heads=p.num_heads,
        joint_attention_dim=p.context_in_dim,
        pooled_projection_dim=p.vec_in_dim,
        guidance_embeds=p.guidance_embed,
        axes_dims_rope=tuple(p.axes_dim),
    )
    theirs.load_state_dict(to_diffusers_transformer(model.state_dict(), p.hidden_size))
    return theirs.eval().requires_grad_(False)


AE_NAMES = {
    r"\bnorm_out\b": "conv_norm_out",
    r"\bnin_shortcut\b": "conv_shortcut",
    r"\bmid\.block_1\b": "mid_block.resnets.0",
    r"\bmid\.block_2\b": "mid_block.resnets.1",
    r"\bmid\.attn_1\.norm\b": "mid_block.attentions.0.group_norm",
    r"\bmid\.attn_1\.([qkv])\b": r"mid_block.attentions.0.to_\1",
    r"\bmid\.attn_1\.proj_out\b": "mid_block.attentions.0.to_out.0",
    r"\bdown\.(\d)\.block\b": r"down_blocks.\1.resnets",
    r"\bdown\.(\d)\.downsample\b": r"down_blocks.\1.downsamplers.0",
    r"\bup\.(\d)\.block\b": r"up_blocks.\1.resnets",
    r"\bup\.(\d)\.upsample\b": r"up_blocks.\1.upsamplers.0",
}


def to_diffusers_autoencoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `AutoEncoder` as one of diffusers' AutoencoderKL."""
    mapped = {}
    for name, tensor in weights.items():
        for pattern, replacement in AE_NAMES.items():
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up_blocks.{3 - int(found[1])}", name)
        mapped[name] = tensor[:, :, 0, 0] if ".to_" in name and tensor.ndim == 4 else tensor
    return mapped


def diffusers_autoencoder(ae: AutoEncoder):
    """The same model in diffusers, without the scale and shift, which are its pipeline's business."""
    from diffusers import AutoencoderKL

    p = ae.params
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(p.ch * mult for mult in p.ch_mult),
        layers_per_block=p.num_res_blocks,
        latent_channels=p.z_channels,
        norm_num_groups=p.num_groups,
        scaling_factor=p.scale_factor,
        shift_factor=p.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    theirs.load_state_dict(to_diffusers_autoencoder(ae.state_dict()))
    return theirs.eval().requires_grad_(False)


# ---- flux-nano


def load_nano(name: str = "flux-nano"):
    """A bundled model, in float32 on the CPU."""
    from flux.loaded_model import LoadedModel
    from flux.settings.complete import resolve
    from flux.settings.demos import ModelSettings

    return LoadedModel.load(resolve(ModelSettings(model=name, device="cpu", dtype="float32")))


def load_nano_in_diffusers(name: str = "flux-nano"):
    """FluxPipeline of the files themselves; only the four-step model, a difference, is merged by us."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    spec = configs[name]
    folder = spec.folder
    model, ae = Flux(spec.params), AutoEncoder(spec.ae_params)
    if spec.lora_filename:
        model = load_nano(name).model
    else:
        model.load_state_dict(unscaled(load_file(folder / spec.repo_flow)))
    ae.load_state_dict(unscaled(load_file(folder / spec.repo_ae)))
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=spec.shifted, base_shift=spec.base_shift, max_shift=spec.max_shift
        ),
        vae=diffusers_autoencoder(ae),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=diffusers_transformer(model),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unscaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit numbers times their scales, one for the whole tensor or one for each row, in float32."""
    plain = {}
    for name, x in weights.items():
        scales = [f"{name.removesuffix('.weight')}.{ending}" for ending in ("scale_weight", "weight_scale")]
        scale = next((weights[each].float() for each in scales if each in weights), torch.ones(()))
        plain[name] = x.float() * scale.reshape(-1, *[1] * (x.ndim - 1))
    extras = {"scale_weight", "weight_scale", "scaled_fp8"}
    return {name: x for name, x in plain.items() if name.rpartition(".")[2] not in extras}
