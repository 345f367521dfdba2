"""How alike two pictures are, by several measures, each loaded only when asked for."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.metrics.features import PerceptualEncoder, similarity

CHUNK = 32  # pictures in memory at once, and in a batch of a metric's net
MAX_PSNR = 100.0  # dB, that of equal pictures


class Metric:
    """How alike pictures are to their references."""

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Metric":
        """The metric, ready for work; `source` is the hub id or folder of its net, None the usual one.

        Raises:
            InputError: a package or weights that are not there.
        """
        return cls()

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        """The similarity of each picture to the reference at its place, of the same size; more is more
        alike.
        """
        raise NotImplementedError

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        """Similarities -> how much each picture changed: 0 if not at all, more if less alike."""
        return 1 - values


class Dino(Metric):
    """Cosine of DINOv2's CLS features, in -1..1; the paper's measure, with the ViT-g/14 (appendix A.2)."""

    def __init__(self, encoder: PerceptualEncoder):
        self.encoder = encoder

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Dino":
        return cls(PerceptualEncoder.load(source or "facebook/dinov2-giant", device))

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return _cosines(self.encoder.embed, references, pictures)


class Clip(Metric):
    """Cosine of CLIP's image embeddings, after the projection; the paper's appendix B.2, with the
    ViT-L/14.
    """

    def __init__(self, model, processor):
        self.model = model.float().eval().requires_grad_(False)
        self.processor = processor

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Clip":
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        name = source or "openai/clip-vit-large-patch14"
        problem = f"Got metric clip with {name} as its net, which is"
        try:
            processor = CLIPImageProcessorPil.from_pretrained(name)
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if Path(name).is_dir():
                raise InputError(f"{problem} a folder without a whole CLIP vision model in it") from error
            raise InputError(
                f"{problem} no folder here, and the hub did not give it: give a folder or a hub id, or leave "
                "clip out"
            ) from error
        # transformers fills what a file lacks with random numbers.
        if report["missing_keys"]:
            raise InputError(
                f"{problem} no whole CLIP vision model: {min(report['missing_keys'])} is missing"
            )
        return cls(model.to(device), processor)

    @torch.no_grad()
    def embed(self, images: list[Image]) -> Tensor:
        """Pictures of any sizes -> "B C"."""
        features = []
        for start in range(0, len(images), CHUNK):
            pixels = self.processor(images[start : start + CHUNK], return_tensors="pt")["pixel_values"]
            features.append(self.model(pixel_values=pixels.to(self.model.device)).image_embeds)
        return torch.cat(features)

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return _cosines(self.embed, references, pictures)


class Psnr(Metric):
    """10 log10(255^2 / mean squared error) in dB, at most MAX_PSNR, which equal pictures have.

    Its change is the root mean square error as a fraction of the range of the pixels, 10^(-dB / 20): it falls
    as the dB rise, and is in 0..1, so that one nearly unchanged picture does not rule the mean.
    """

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        values = []
        for pair in zip(references, pictures, strict=True):
            a, b = (np.asarray(picture, dtype=np.float64) for picture in pair)
            error = np.square(a - b).mean()
            values.append(min(MAX_PSNR, float(10 * np.log10(255**2 / error))) if error else MAX_PSNR)
        return values

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        return np.where(values >= MAX_PSNR, 0, 10 ** (-values / 20))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004, "Image Quality Assessment", equation 13): means, variances and
    covariance under a gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03; the mean over
    all windows that lie in the picture and over red, green and blue.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        # float64, since variances are small differences of squares; Apple's GPU has none.
        self.device = "cpu" if torch.device(device).type == "mps" else device
        window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
        self.window = (window / window.sum()).tolist()

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Ssim":
        return cls(device)

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return [self._of_pair(*pair) for pair in zip(references, pictures, strict=True)]

    def _of_pair(self, reference: Image, picture: Image) -> float:
        if min(picture.size) < len(self.window):
            raise InputError(
                f"Got a picture of {picture.width}x{picture.height} for ssim: expected 11x11 at least"
            )
        x, y = (to_tensor(image).to(self.device, torch.float64) / 2 + 0.5 for image in (reference, picture))
        moments = torch.stack((x, y, x * x, y * y, x * y))
        for dim in (-1, -2):
            places = moments.shape[dim] - len(self.window) + 1
            blurred = torch.zeros_like(moments.narrow(dim, 0, places))
            for shift, weight in enumerate(self.window):
                blurred.add_(moments.narrow(dim, shift, places), alpha=weight)
            moments = blurred
        mean_x, mean_y, xx, yy, xy = moments
        variances = xx - mean_x.square() + yy - mean_y.square()
        covariance = xy - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values = values / ((mean_x.square() + mean_y.square() + c1) * (variances + c2))
        return values.mean().item()


class Lpips(Metric):
    """1 minus LPIPS 0.1 (Zhang et al. 2018) on AlexNet, its authors' package's default, or on the net that
    `source` names ("squeeze" for SqueezeNet); a change is thus the LPIPS distance itself.
    """

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor], device: str | torch.device = "cpu"):
        self.net, self.device = net, device

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Lpips":
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # the latter from a torchvision for another torch
            raise InputError(
                f"Got metric lpips, whose package cannot be imported ({error}): pip install lpips, or leave "
                "lpips out"
            ) from error
        try:
            net = lpips.LPIPS(net=source or "alex", verbose=False)
        except (OSError, RuntimeError) as error:
            file = "squeezenet1_1-b8a52dc0.pth" if source == "squeeze" else "alexnet-owt-7be5be79.pth"
            raise InputError(
                f"Got metric lpips, whose net torchvision could not download ({error}): put "
                f"{file} into {torch.hub.get_dir()}/checkpoints, or leave lpips out"
            ) from error
        return cls(net.to(device).requires_grad_(False), device)

    @torch.no_grad()
    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        distances = [
            self.net(*(to_tensor(picture)[None].to(self.device) for picture in pair)).item()
            for pair in zip(references, pictures, strict=True)
        ]
        return [1 - distance for distance in distances]


METRICS: dict[str, type[Metric]] = {"dino": Dino, "psnr": Psnr, "ssim": Ssim, "lpips": Lpips, "clip": Clip}


def load_metrics(
    names: Sequence[str],
    sources: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Metric]:
    """The metrics of these names (of METRICS), in their order: the first is the one that selects.

    Args:
        sources: hub id or folder of the net of "dino" or "clip", where it is not the usual one.

    Raises:
        InputError: an unknown name, or as `Metric.load`.
    """
    for name in names:
        if name not in METRICS:
            raise InputError(f"Got unknown metric {name!r}: expected some of {', '.join(METRICS)}")
    return {name: METRICS[name].load((sources or {}).get(name), device) for name in names}


def _cosines(
    embed: Callable[[list[Image]], Tensor], references: Sequence[Image], pictures: Sequence[Image]
) -> list[float]:
    distinct = {id(picture): picture for picture in (*references, *pictures)}
    features = dict(zip(distinct, embed(list(distinct.values()))))
    a, b = (torch.stack([features[id(picture)] for picture in side]) for side in (references, pictures))
    return similarity(a, b).tolist()
