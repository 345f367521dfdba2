"""The frozen transformer that a LoRA is trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flux.model import Flux
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import BITS, quantize_linears, to_fp8
from flux.settings.train import TrainSettings
from flux.weights.open_model import OpenModel


@dataclass(frozen=True, eq=False)
class Base:
    """The transformer, loaded.

    Attributes:
        model: The transformer, in fewer bits if the settings say so.
        offloaded: Copies its blocks to the device while they compute, if any of them are streamed.
    """

    model: Flux
    offloaded: Offloaded | None

    @classmethod
    def load(
        cls,
        settings: TrainSettings,
        opened: OpenModel,
        device: torch.device,
        dtype: torch.dtype,
        streamed: int,
    ) -> "Base":
        """Load the transformer.

        Args:
            settings: How many bits its weights have.
            opened: Its files.
            device: Where it computes.
            dtype: The dtype that it computes in.
            streamed: Number of blocks that are streamed.

        Raises:
            InputError: As `OpenModel.load_transformer`.
        """
        cpu = torch.device("cpu")
        home = cpu if streamed else device
        # What is quantised is moved to the device matrix by matrix.
        first_home = home if settings.quantize == "none" else cpu
        model = opened.load_transformer(first_home, dtype, BITS[settings.quantize] == 8)
        blocks = [model.double_blocks, model.single_blocks]
        if settings.quantize == "fp8":
            to_fp8(blocks, device, home)
        elif settings.quantize != "none":
            quantize_linears(blocks, BITS[settings.quantize], device, home)
        model.to(home)
        return cls(model, Offloaded(model, device, blocks, streamed) if streamed else None)

    @contextmanager
    def on_device(self) -> Iterator[Flux]:
        """Hold the transformer on the device within the block."""
        if self.offloaded is None:
            yield self.model
        else:
            with self.offloaded.on_device():
                yield self.model
