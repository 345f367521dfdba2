"""One training process for each GPU, and the few messages that the processes exchange."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Cluster:
    """The processes that torchrun started, or the only one. Each has its own device.

    Attributes:
        rank: The number of this process.
        world: The number of processes.
        device: The device of this process.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> "Cluster":
        """Join the processes of torchrun, through NCCL on GPUs and gloo on CPUs."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        return cls(rank, world, device)

    def leave(self) -> None:
        """End the connection."""
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def broadcast_number(self, number: float) -> float:
        """Return the first process's number, in every process."""
        if self.world == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def mean(self, number: Tensor) -> float:
        """Average a scalar over the processes."""
        shared = number.detach().float().reshape(1).clone()
        if self.world > 1:
            dist.all_reduce(shared)
        return shared.item() / self.world

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with the first process's values, in every process."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average all gradients in one flat bfloat16 message: one call for hundreds, half the bytes."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1).to(torch.bfloat16) for gradient in gradients]) / self.world
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        averages = [part.view_as(gradient) for part, gradient in zip(parts, gradients)]
        torch._foreach_copy_(gradients, averages)  # pyright: ignore[reportPrivateImportUsage]
