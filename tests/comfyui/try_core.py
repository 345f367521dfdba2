"""Run the nodes in ComfyUI's own core on the CPU, with flux-nano's weights, and compare with this package.

    python tests/comfyui/try_core.py PATH_TO_COMFYUI FOLDER [--scan]

ComfyUI's FLUX takes flux-nano's weights under the names of the file, so its sampler, model patcher and
hooks can be tried without FLUX.1. Writes images to FOLDER. Takes some minutes; --scan takes more.
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from einops import rearrange
from PIL import Image

from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.sampling import euler_step
from flux.settings.demos import ModelSettings

GUIDANCE, STEPS, END, SIZE = 3.5, 20, 0.25, 256
PROMPTS = [
    "a dog on the grass",
    "a cat on the grass",
    "a dog wearing a top hat on the grass",
    "a dog on the grass at night",
]
# Modules that ComfyUI imports at its start and that nothing here uses.
UNUSED = (
    "torchvision",
    "torchaudio",
    "torchsde",
    "av",
    "kornia",
    "spandrel",
    "aiohttp",
    "alembic",
    "sqlalchemy",
)


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of unused ones that are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


class Clip:
    """flux-nano's text encoders under the names of ComfyUI's."""

    def __init__(self, pipe: LoadedModel):
        self.pipe = pipe

    def tokenize(self, text: str) -> dict:
        return {"text": [[(text, 1.0)]]}

    def encode_from_tokens_scheduled(self, tokens: dict) -> list:
        cond = self.pipe.condition([tokens["text"][0][0][0]], GUIDANCE)
        return [[cond.txt, {"pooled_output": cond.vec}]]


class Vae:
    """flux-nano's autoencoder under the name of ComfyUI's."""

    def __init__(self, pipe: LoadedModel, model):
        self.pipe, self.model = pipe, model

    def images(self, samples: torch.Tensor) -> list[Image.Image]:
        latents = rearrange(
            self.model.process_latent_in(samples), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2
        )
        return self.pipe.decode(latents, SIZE, SIZE)

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        pixels = [
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in self.images(samples)
        ]
        return torch.stack(pixels).reshape(-1, SIZE, SIZE, 3).float() / 255


def build(pipe: LoadedModel):
    """ComfyUI's model patcher around ComfyUI's FLUX with flux-nano's weights, in float32."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    names = (
        "vec_in_dim",
        "context_in_dim",
        "hidden_size",
        "mlp_ratio",
        "num_heads",
        "depth",
        "theta",
        "qkv_bias",
    )
    params = {
        name: getattr(pipe.spec.params, name) for name in (*names, "depth_single_blocks", "guidance_embed")
    }
    params |= {
        "axes_dim": list(pipe.spec.params.axes_dim),
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
    }
    config = comfy.supported_models.Flux({"image_model": "flux", "dtype": torch.float32, **params})
    config.custom_operations, config.manual_cast_dtype = comfy.ops.disable_weight_init, None
    model = comfy.model_base.Flux(config, device="cpu")
    model.diffusion_model.load_state_dict(pipe.model.state_dict())
    model.model_sampling.set_parameters(shift=pipe.spec.base_shift)  # of an image of 256 tokens
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def by_this_package(pipe: LoadedModel, noise: torch.Tensor, layers) -> torch.Tensor:
    """The reference and its edits by this package's steps: latent rows."""
    levels, ids = pipe.schedule(STEPS, SIZE, SIZE), pipe.image_ids(1, SIZE, SIZE)
    reference = rearrange(noise[:1], "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    edits = reference.expand(len(PROMPTS) - 1, -1, -1)
    source, target = pipe.condition(PROMPTS[:1], GUIDANCE), pipe.condition(PROMPTS[1:], GUIDANCE)
    for step, (t, t_next) in enumerate(pairwise(levels)):
        keep = frozenset(layers) if step < END * STEPS else frozenset()
        first = euler_step(pipe.model, reference, ids, source, t, t_next, Intervention(keep=keep))
        inject = Intervention(inject=first.kept.positive)
        reference, edits = first.latent, euler_step(pipe.model, edits, ids, target, t, t_next, inject).latent
    latents = torch.cat((reference, edits))
    return rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=SIZE // 16, p=2, q=2)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scan", action="store_true", help="run the Layer Scan node too")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pipe = LoadedModel.load(ModelSettings(model="flux-nano", dtype="float32", device="cpu"))

    sys.path[:0] = [str(arguments.comfyui), str(Path(__file__).parents[2])]
    sys.argv = ["try_core.py", "--cpu"]
    sys.meta_path.append(Missing())
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers

    from comfyui import nodes
    from comfyui.injection import calls_attn1_patch

    patcher, clip = build(pipe), Clip(pipe)
    vae, euler = Vae(pipe, patcher.model), comfy.samplers.sampler_object("euler")
    for node in (
        nodes.VitalLayers,
        nodes.StableFlowPrompts,
        nodes.StableFlowEdit,
        nodes.SkipLayers,
        nodes.LayerScan,
    ):
        node.GET_SCHEMA()
    print(f"blocks call attn1_patch: {calls_attn1_patch(patcher)}")

    def sample(model, positive, latent, seed, name):
        noise = comfy.sample.prepare_noise(latent["samples"], seed, latent["batch_index"])
        sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", STEPS)
        drawn = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            euler,
            sigmas,
            positive,
            positive,
            latent["samples"],
            disable_pbar=True,
            seed=seed,
        )
        images = vae.images(drawn)
        sheet = Image.new("RGB", (SIZE * len(images), SIZE))
        for place, image in enumerate(images):
            sheet.paste(image, (SIZE * place, 0))
        sheet.save(arguments.folder / f"{name}.png")
        return noise, drawn

    layers = nodes.VitalLayers.execute(next(iter(nodes.PRESETS)), "4, 0", "").args[0]
    empty = {"samples": torch.zeros(1, 16, SIZE // 8, SIZE // 8)}
    positive, latent = nodes.StableFlowPrompts.execute(
        clip, PROMPTS[0], "\n".join(PROMPTS[1:]), empty, GUIDANCE
    ).args

    edit = nodes.StableFlowEdit.execute(patcher, layers, 1.0, 0.0, END).args[0]
    noise, drawn = sample(edit, positive, latent, 3, "edits")
    mine = patcher.model.process_latent_out(by_this_package(pipe, noise, layers))
    print(f"edits: latents differ by {(drawn - mine).abs().max():.1e}, the largest is {mine.abs().max():.1f}")

    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 40:220, 20:140] = 1
    _, masked = sample(
        nodes.StableFlowEdit.execute(patcher, layers, 1.0, 0.0, END, mask).args[0],
        positive,
        latent,
        3,
        "masked",
    )
    outside = (masked[1:] - masked[:1])[..., 24:].abs().max()
    print(f"masked: outside, edits differ from the reference by {outside:.1e}")

    photo = {"samples": drawn[:1]}
    positive, latent = nodes.StableFlowPrompts.execute(
        clip, PROMPTS[0], "\n".join(PROMPTS[1:]), photo, GUIDANCE
    ).args
    held = nodes.StableFlowEdit.execute(patcher, layers, 1.0, 0.0, 0.5, None, photo).args[0]
    _, edited = sample(held, positive, latent, 7, "photograph")
    print(f"photograph: the first row differs from it by {(edited[:1] - photo['samples']).abs().max():.1e}")

    skipped = nodes.SkipLayers.execute(patcher, "4", 0.0, 1.0).args[0]
    _, without = sample(
        skipped, positive, {**latent, "samples": torch.zeros_like(latent["samples"])}, 3, "skipped"
    )
    print(f"skipped: latents differ from the reference's by {(without[:1] - drawn[:1]).abs().max():.1f}")

    if arguments.scan:
        file = str(arguments.folder / "vital_layers.json")
        vital, chart, path = nodes.LayerScan.execute(
            patcher,
            clip,
            vae,
            "\n".join(PROMPTS[:2]),
            empty,
            0,
            8,
            GUIDANCE,
            2,
            pipe.spec.dinov2,
            "flux-nano",
            file,
        ).args
        Image.fromarray((chart[0] * 255).round().byte().numpy()).save(arguments.folder / "chart.png")
        print(f"scan: {vital} are vital, {path}")


if __name__ == "__main__":
    main()
