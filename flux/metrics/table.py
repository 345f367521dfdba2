"""The metrics by name."""

from collections.abc import Mapping, Sequence

import torch

from flux.errors import InputError
from flux.metrics.base import Metric
from flux.metrics.features import Clip, Dino, Lpips
from flux.metrics.pixels import Psnr, Ssim

METRICS: dict[str, type[Metric]] = {"dino": Dino, "psnr": Psnr, "ssim": Ssim, "lpips": Lpips, "clip": Clip}


def load_metrics(
    names: Sequence[str],
    sources: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Metric]:
    """Load metrics by name, and only these.

    Args:
        names: Keys of METRICS. The result has their order; the first one selects the vital layers.
        sources: Hub id or folder of the model of "dino" or "clip", if not the usual one.
        device: Where the models compute.

    Raises:
        InputError: An unknown name, or a metric that cannot be loaded (see `Metric.load`).
    """
    for name in names:
        if name not in METRICS:
            raise InputError(f"Got unknown metric {name!r}: expected some of {', '.join(METRICS)}")
    return {name: METRICS[name].load((sources or {}).get(name), device) for name in names}
