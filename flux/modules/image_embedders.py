"""Image encoders of conditions: maps of edges and depth for the control models, text tokens for Redux."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from flux.errors import InputError

DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"
SIGLIP = "google/siglip-so400m-patch14-384"


class CannyImageEncoder:
    """Draws the edges that Canny's method finds in an image, white on black.

    Args:
        device: Device of the maps.
        min_t: Threshold of a gradient that continues an edge, in levels of 0..255.
        max_t: Threshold of a gradient that begins an edge.

    Raises:
        InputError: OpenCV is not installed.
    """

    def __init__(self, device: torch.device | str, min_t: int = 50, max_t: int = 200):
        try:
            import cv2
        except ImportError as error:
            raise InputError(
                "Edges are found by OpenCV, which is not installed: pip install opencv-python-headless"
            ) from error
        self.device, self._canny = torch.device(device), cv2.Canny
        self.min_t, self.max_t = min_t, max_t

    def __call__(self, img: Tensor) -> Tensor:
        """Return the edges of images in -1..1, "B 3 H W", as images of -1 and 1, "B 3 H W"."""
        edges = [self._canny(levels, self.min_t, self.max_t) for levels in _levels(img)]
        maps = torch.from_numpy(np.stack(edges)).float() / 127.5 - 1
        return maps[:, None].expand(-1, 3, -1, -1).to(self.device)


class DepthImageEncoder:
    """Estimates how near each pixel of an image is.

    Args:
        device: Where the model computes.
        model: Hub id or folder of a depth model of transformers.

    Raises:
        InputError: There is no such model, or it is not whole.
    """

    def __init__(self, device: torch.device | str, model: str | Path = DEPTH_MODEL):
        self.device = torch.device(device)
        self.depth_model, self.processor = _load("depth model", "AutoModelForDepthEstimation", model)
        self.depth_model.to(self.device)

    @torch.no_grad()
    def __call__(self, img: Tensor) -> Tensor:
        """Return the nearness of images in -1..1, "B 3 H W", as images of the same size.

        The models were trained on the estimate divided by 127.5, less 1, whatever its range is.
        """
        inputs = self.processor(list(_levels(img)), return_tensors="pt").to(self.device)
        nearness = self.depth_model(**inputs).predicted_depth[:, None].expand(-1, 3, -1, -1)
        scaled = F.interpolate(nearness, img.shape[-2:], mode="bicubic", antialias=True)
        return scaled / 127.5 - 1


class ReduxImageEncoder(nn.Module):
    """Encodes an image as text tokens: SigLIP's features, mapped to T5's by the Redux adapter.

    Args:
        device: Where it computes.
        redux_path: File of the adapter.
        redux_dim: Features of SigLIP.
        txt_in_features: Features of T5.
        dtype: What it computes in.
        siglip: Hub id or folder of the SigLIP.

    Raises:
        InputError: A file is missing, not whole, or has other sizes.
    """

    def __init__(
        self,
        device: torch.device | str,
        redux_path: str | Path,
        redux_dim: int = 1152,
        txt_in_features: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        siglip: str | Path = SIGLIP,
    ):
        super().__init__()
        self.device, self.dtype = torch.device(device), dtype
        self.redux_dim = redux_dim
        with torch.device("meta"):
            self.redux_up = nn.Linear(redux_dim, 3 * txt_in_features)
            self.redux_down = nn.Linear(3 * txt_in_features, txt_in_features)
        self._load_adapter(redux_path)
        self.siglip, self.normalize = _load("SigLIP", "SiglipVisionModel", siglip, dtype)
        if (found := self.siglip.config.hidden_size) != redux_dim:
            raise InputError(
                f"Got {siglip} as the SigLIP, which has {found} features: the adapter takes {redux_dim}"
            )
        self.to(self.device).eval().requires_grad_(False)

    def _load_adapter(self, path: str | Path) -> None:
        """Read both layers of the adapter from its file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"Got {path} as the Redux adapter, which cannot be read ({error})") from error
        expected = {name: tuple(each.shape) for name, each in self.state_dict().items()}
        if (found := {name: tuple(each.shape) for name, each in weights.items()}) != expected:
            wrong = min({*found.items()} ^ {*expected.items()})[0]
            raise InputError(
                f"Got {path} as the Redux adapter, whose {wrong} is {found.get(wrong, 'missing')}: expected "
                f"{expected.get(wrong, 'no such tensor')}"
            )
        weights = {name: x.to(self.dtype) for name, x in weights.items()}
        self.load_state_dict(weights, assign=True)

    @torch.no_grad()
    def forward(self, x: Image | Sequence[Image]) -> Tensor:
        """Return the text tokens of one image or several, "B n features": 729 of 4096 by default."""
        images = list(x) if isinstance(x, Sequence) else [x]
        inputs = self.normalize([image.convert("RGB") for image in images], return_tensors="pt")
        features = self.siglip(**inputs.to(self.device, self.dtype)).last_hidden_state
        return self.redux_down(F.silu(self.redux_up(features)))


def _levels(img: Tensor) -> np.ndarray:
    """Return images in -1..1, "B 3 H W", in levels of 0..255, "B H W 3".

    They are rounded: a level that went through -1..1 in float32 may come back a little too small.
    """
    levels = ((img.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def _load(
    name: str, class_name: str, source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a model of transformers and its image processor, which uses Pillow with or without torchvision.

    Raises:
        InputError: It cannot be loaded, or lacks weights, which transformers would draw at random.
    """
    import transformers
    from safetensors import SafetensorError

    source = str(source)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
        model, report = getattr(transformers, class_name).from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _no_model(name, source) from error
    if report["missing_keys"]:
        raise InputError(f"Got {source} as the {name}, which lacks {min(report['missing_keys'])}")
    return model.eval().requires_grad_(False), processor


def check_source(name: str, source: str | Path) -> None:
    """Check that a folder or a hub id has a model of transformers, by its config.json alone.

    Args:
        name: How messages call the model.
        source: The folder or hub id.

    Raises:
        InputError: It has none.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _no_model(name, source) from error


def _no_model(name: str, source: str | Path) -> InputError:
    is_folder = Path(source).is_dir()
    where = "a folder without a whole one" if is_folder else "no folder here, and the hub did not give it"
    return InputError(f"Got {source} as the {name}, which is {where}: give a folder or a hub id")
