"""Start noise, packing, and everything that a pass needs for one size of image.

A latent is "B 16 h w" with h and w an eighth of the image's sides. Packed, 2x2 of its places make one token:
"B I 64".
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from einops import repeat as tile
from torch import Tensor


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Sides of the latent of an image of that size in pixels, rounded up to whole tokens."""
    return 2 * math.ceil(height / 16), 2 * math.ceil(width / 16)


def get_noise(
    num_samples: int, height: int, width: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Tensor:
    """Draw start noise, "num_samples 16 h w", on the CPU, so that it is the same on every device.

    Args:
        num_samples: Number of images.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        device: Device of the result.
        dtype: Dtype in which the noise is drawn.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = num_samples, 16, *latent_size(height, width)
    return torch.randn(shape, dtype=dtype, generator=generator).to(device)


def pack(latent: Tensor) -> Tensor:
    """Pack 2x2 places to one token: "B c h w" -> "B I 4c"."""
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:  # noqa: ARG001  (upstream's call)
    """Unpack the tokens of an image of that size in pixels: "B I 4c" -> "B c h w"."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=math.ceil(height / 16), ph=2, pw=2)


def image_ids(batch: int, height: int, width: int, device: torch.device | str, index: int = 0) -> Tensor:
    """Positions (index, row, column) of the tokens of an image of that size in pixels, "B I 3", float32.

    The index of the image to make is 0; context images have others.
    """
    rows, columns = (torch.arange(side // 2).float() for side in latent_size(height, width))
    ids = torch.cartesian_prod(torch.tensor([float(index)]), rows, columns)
    return tile(ids, "i axes -> b i axes", b=batch).to(device)


def prepare(t5: Callable, clip: Callable, img: Tensor, prompt: str | list[str]) -> dict[str, Tensor]:
    """Make everything that `denoise` needs: the packed latent, the texts' features, the positions of both.

    Args:
        t5: Encodes prompts to "B T features".
        clip: Encodes prompts to "B features".
        img: Latent, "B 16 h w". A single row serves all prompts.
        prompt: One for each row, or one that serves all rows.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if img.shape[0] == 1:
        img = img.expand(len(prompts), -1, -1, -1)
    batch, _, height, width = img.shape
    txt, vec = t5(prompts), clip(prompts)
    if len(prompts) == 1:
        txt, vec = txt.expand(batch, -1, -1), vec.expand(batch, -1)
    return {
        "img": pack(img),
        "img_ids": image_ids(batch, 8 * height, 8 * width, img.device),
        "txt": txt.to(img.device),
        "txt_ids": torch.zeros(batch, txt.shape[1], 3, device=img.device),
        "vec": vec.to(img.device),
    }
