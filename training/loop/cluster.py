"""One process for each GPU: who I am, and the few things the processes say to one another."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Cluster:
    """The processes torchrun started (or the only one), each with a device of its own."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> "Cluster":
        """Joins the processes of torchrun: NCCL between GPUs, gloo between CPUs."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        return cls(rank, world, device)

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, number: float) -> float:
        """The first process's number, on all."""
        if self.world == 1:
            return number
        shared = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def mean(self, number: Tensor) -> float:
        """The mean of a scalar over the processes."""
        shared = number.detach().float().reshape(1).clone()
        if self.world > 1:
            dist.all_reduce(shared)
        return shared.item() / self.world

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Everyone takes the first process's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Means of all gradients in one flat bfloat16 message: one call instead of hundreds, half
        the bytes.
        """
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1).to(torch.bfloat16) for gradient in gradients]) / self.world
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])
