"""The interface of metrics that compare two images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL.Image import Image


class Metric(ABC):
    """A measure of how similar images are to their references.

    Attributes:
        change_name: What `change` computes, in words.
    """

    change_name: ClassVar[str] = "1 \N{MINUS SIGN} similarity"

    @classmethod
    @abstractmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Metric":
        """Load the metric.

        Args:
            source: Hub id or folder of its model. If None, the usual one.
            device: Where the model computes.

        Raises:
            InputError: A package or the model's weights are missing.
        """

    @abstractmethod
    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return each image's similarity to the reference at its place; more is more similar.

        Args:
            references: One for each image, of the same size.
            images: The images to compare.
        """

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        """Convert similarities to changes: 0 for an equal image, larger for a less similar one."""
        return 1 - values
