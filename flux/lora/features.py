"""Features that training needs of the other models, computed once: latents of images, features of texts.

Each model is loaded, asked and freed before the next, and all of them before the transformer loads. The
results are kept in a file, so that a run that resumes loads none of them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux import sampling
from flux.files import write_bytes
from flux.images.io import crop_to_fit, read_image, to_tensor
from flux.lora.dataset import TrainingSet
from flux.metrics.features import PerceptualEncoder
from flux.runtime.quantize import quantize_linears
from flux.runtime.tiling import in_tiles
from flux.settings.train import TrainSettings
from flux.weights.checkpoint import open_checkpoint
from flux.weights.layouts import Part
from flux.weights.open_model import OpenModel
from flux.weights.save import safetensors_bytes

FILE = "features.safetensors"


@dataclass(frozen=True)
class Features:
    """The latents of images and the features of texts, all on the CPU.

    Attributes:
        latents: The packed latent of each example, "1 I 64".
        txt: T5's features of each text, "1 T features".
        vec: CLIP's features of each text, "1 features".
        dino: DINOv2's features of the training images, "n C". None if there are no samples to compare.
        contexts: The packed latent of each example's context image, "1 I 64". Empty without pairs.
    """

    latents: list[Tensor]
    txt: dict[str, Tensor]
    vec: dict[str, Tensor]
    dino: Tensor | None
    contexts: Sequence[Tensor] = ()


def read_features(folder: Path, key: str, texts: Sequence[str]) -> Features | None:
    """Read the features that an earlier start has written. None if there are none with this key."""
    path = folder / FILE
    if not path.is_file():
        return None
    checkpoint = open_checkpoint(path)
    if checkpoint.metadata.get("key") != key:
        return None
    tensors = {name: tensor.stored.read("cpu") for name, tensor in checkpoint.tensors.items()}

    def numbered(kind: str) -> list[Tensor]:
        count = sum(name.startswith(f"{kind}.") for name in tensors)
        return [tensors[f"{kind}.{number}"] for number in range(count)]

    return Features(
        numbered("latent"),
        {text: tensors[f"txt.{number}"] for number, text in enumerate(texts)},
        {text: tensors[f"vec.{number}"] for number, text in enumerate(texts)},
        tensors.get("dino"),
        numbered("context"),
    )


def write_features(folder: Path, key: str, features: Features) -> None:
    """Write the features for later starts. Raises InputError as `flux.files.write_bytes`."""
    tensors = {f"latent.{number}": latent for number, latent in enumerate(features.latents)}
    tensors |= {f"context.{number}": latent for number, latent in enumerate(features.contexts)}
    tensors |= {f"txt.{number}": txt for number, txt in enumerate(features.txt.values())}
    tensors |= {f"vec.{number}": vec for number, vec in enumerate(features.vec.values())}
    if features.dino is not None:
        tensors["dino"] = features.dino
    write_bytes(folder / FILE, safetensors_bytes(tensors, {"key": key}))


def features_key(training: TrainingSet, opened: OpenModel, texts: Sequence[str], about: Sequence[str]) -> str:
    """Identify features by everything that they depend on.

    Args:
        training: The images and captions.
        opened: The model.
        texts: The texts.
        about: Whatever else changes them.
    """
    parts = ("vae", "text_encoder", "text_encoder_2")
    files = [opened.checkpoint(part).fingerprint() for part in parts]
    data = [training.fingerprint, files, list(texts), list(about)]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:32]


@torch.no_grad()
def compute_features(
    settings: TrainSettings,
    opened: OpenModel,
    training: TrainingSet,
    texts: Sequence[str],
    encoder: PerceptualEncoder | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Features:
    """Load the autoencoder and the text encoders one after another, and ask them.

    Args:
        settings: How they run.
        opened: The model's files.
        training: The images.
        texts: The texts.
        encoder: The DINOv2 of the curves, if there are any.
        device: Where they compute.
        dtype: The dtype that they compute in.
    """
    latents, contexts = _latents(settings, opened, training, device, dtype)
    t5 = _encoded("text_encoder_2", settings, opened, texts, device, dtype)
    clip = _encoded("text_encoder", settings, opened, texts, device, dtype)
    dino = encoder.embed([read_image(path) for path in training.images]).cpu() if encoder else None
    return Features(latents, t5, clip, dino, contexts)


def _latents(
    settings: TrainSettings,
    opened: OpenModel,
    training: TrainingSet,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """The latents of all examples and, of pairs, those of their context images."""
    ae, latents, contexts = opened.load_autoencoder(device, dtype), [], []

    def encode(image: Image.Image) -> Tensor:
        pixels = to_tensor(image)[None].to(device, dtype)
        latent = in_tiles(ae.encode, pixels, 1 / 8) if settings.tiled else ae.encode(pixels)
        return sampling.pack(latent).cpu()

    for example in tqdm(training.examples, desc="images", unit="image"):
        image = read_image(example.path)
        if example.context is None:
            latents.append(encode(crop_to_fit(image, *example.size)))
            continue
        # As `kontext_condition` scales them, so that both show each thing at one place.
        for each, found in ((image, latents), (read_image(example.context), contexts)):
            found.append(encode(each.resize(example.size, Image.Resampling.LANCZOS)))
    return latents, contexts


def _encoded(
    part: Part,
    settings: TrainSettings,
    opened: OpenModel,
    texts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The features of each text by one of the text encoders."""
    is_t5 = part == "text_encoder_2"
    home = torch.device("cpu") if is_t5 and settings.t5 == "cpu" else device
    packs = is_t5 and settings.t5 == "8bit"
    encoder = opened.load_text_encoder(part, "cpu" if packs else home, dtype, packs)
    if packs:
        quantize_linears([encoder.hf_module.get_submodule("encoder.block")], 8, home, home)
        encoder.to(home)
    return {text: encoder([text]).to("cpu", dtype) for text in tqdm(texts, desc=part, unit="text")}
