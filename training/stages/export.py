"""Stage "export": writes the trained models as the files that the package ships.

The matrices of the transformer and the low-rank difference of the four-step student become scaled 8-bit
floats, those of the autoencoder scaled 8-bit whole numbers. Everything else is in half precision.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.lora.extract import low_rank
from flux.weights.load import read_weights
from training.loop.models import DINO_SIDE, IMAGENET_MEAN, IMAGENET_STD
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.instructions import instruction_words
from training.scenes.vocabulary import all_words
from training.stages.autoencoder import load_autoencoder
from training.stages.flow import load_generator

if TYPE_CHECKING:
    from transformers import Dinov2Model

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = torch.iinfo(torch.int8).max
INPUT_RANK = 128
SMALL = 4096
TINY = torch.finfo(torch.float16).tiny


def scaled_fp8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round matrices to float8_e4m3fn, with a scale each, and vectors to float16.

    The scales are named `X.scale_weight`, as in ComfyUI's files.
    """
    file = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in weights.items():
        value = value.detach().float().cpu().contiguous()
        if value.ndim == 2:
            scale = value.abs().max().clamp(min=1e-12) / FP8_MAX
            file[name] = (value / scale).to(torch.float8_e4m3fn)
            file[name.removesuffix(".weight") + ".scale_weight"] = scale
        else:
            file[name] = value.half()
    return file


def rounded_to_bytes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round matrices and kernels to 8-bit whole numbers, with a scale for each channel.

    Vectors and small kernels, which weigh little and show most, become float16. Beside `X.weight`, its scales
    are named `X.weight_scale`, in float16: see `flux.weights.scales`.
    """
    file = {}
    for name, value in weights.items():
        value = value.detach().float().cpu().contiguous()
        if value.ndim > 1 and value.numel() > SMALL:
            scale = (value.flatten(1).abs().amax(dim=1) / INT8_MAX).clamp(min=TINY).half()
            rounded = (value / scale.float().view(-1, *[1] * (value.ndim - 1))).round()
            file[name] = rounded.clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
            file[f"{name}_scale"] = scale
        else:
            file[name] = value.half()
    return file


def export_judge(weights: dict[str, Tensor], path: Path) -> None:
    """Write the measuring model as the judge that this folder ships, see `training.judge`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded_to_bytes(weights), path)


def export_adapter(weights: dict[str, Tensor], folder: Path, kind: str) -> None:
    """Write the low-rank changes of a kind of condition. The input's change is cut to `INPUT_RANK`."""
    folder.mkdir(parents=True, exist_ok=True)
    down, up = weights["img_in.lora_A.weight"], weights["img_in.lora_B.weight"]
    if len(down) > INPUT_RANK:
        down, up, _ = low_rank(up @ down, INPUT_RANK, None)
    weights = {**weights, "img_in.lora_A.weight": down, "img_in.lora_B.weight": up}
    save_file(scaled_fp8(weights), folder / f"{kind}_lora.safetensors")


def export(work: Work) -> bool:
    """Write `work.folder`/assets, except for the perceptual encoder. Return True."""
    if not work.cluster.first:
        return True
    folder = work.folder / "assets"
    shutil.copytree(work.tokenizers, folder, dirs_exist_ok=True)
    (folder / "vocabulary.txt").write_text("\n".join(all_words()) + "\n")
    (folder / "vocabulary_kontext.txt").write_text("\n".join(instruction_words()) + "\n")
    generator = load_generator(work, "guidance", guidance=True).cpu()
    save_file(scaled_fp8(generator.flux.state_dict()), folder / "transformer.safetensors")
    lora = torch.load(work.result("schnell"), map_location="cpu")
    save_file(scaled_fp8(lora), folder / "schnell_lora.safetensors")
    ae = load_autoencoder(work).cpu()
    save_file(rounded_to_bytes(ae.state_dict()), folder / "ae.safetensors")
    generator.t5.half().save_pretrained(folder / "text_encoder_2")
    generator.clip.half().save_pretrained(folder / "text_encoder")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"export: {folder}, {total / 2**20:.1f} MiB")
    return True


def take_over(work: Work) -> None:
    """Copy what needs no training from the files in `work.begin`, and mark those stages as complete."""
    if not work.cluster.first or work.begin is None:
        return
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(work.begin / name, work.tokenizers / name, dirs_exist_ok=True)
    save_atomically(
        read_weights(work.begin / "ae.safetensors", "cpu", torch.float32), work.result("autoencoder")
    )
    for stage in ("tokenizers", "autoencoder", "flow128"):
        (work.folder / f"{stage}.done").touch()


def export_dinov2(dinov2: "Dinov2Model", folder: Path) -> None:
    """Write the perceptual encoder, and how images are prepared for it."""
    dinov2.half().save_pretrained(folder)
    side = {"height": DINO_SIDE, "width": DINO_SIDE}
    config = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "resample": 3,
        "size": {"shortest_edge": DINO_SIDE}, "do_center_crop": True, "crop_size": side,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
