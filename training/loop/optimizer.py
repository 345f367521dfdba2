"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else."""

# torch has no public names for its operations on lists of tensors.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of matrices `K M N` near one, by Newton-Schulz steps in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalizes the momentum (Muon, kellerjordan.github.io/posts/muon) and steps at AdamW's size.

    The step size is that of arXiv 2502.16982. A convolution counts as a matrix `out (in kh kw)`, a
    query-key-value projection as three matrices.

    `torch.optim.Muon` is no replacement: it refuses convolutions, leaves projections in one piece, and takes
    matrices one by one, 1500 small kernels a step for this model, where here all of one shape go together.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no stage has a closure
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in shapes.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[Tensor], group: dict) -> None:
        momentum, lr = group["momentum"], group["lr"]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(
                    parameter, memory_format=torch.contiguous_format
                )
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad.contiguous() for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, buffers, momentum)).flatten(2)
        rows, columns = ahead.shape[-2:]
        if rows == 3 * columns:
            ahead = ahead.reshape(-1, columns, columns)
        scale = 0.2 * math.sqrt(max(ahead.shape[-2:]))
        moves = orthogonalized(ahead).float().reshape(len(parameters), *parameters[0].shape).unbind(0)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, moves, alpha=-lr * scale)


class Optimizers:
    """Several optimizers that step together. One factor of the schedule scales their learning rates."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]

    def step(self, factor: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor
            optimizer.step()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        """Load the momenta. The learning rates stay those of this stage."""
        for optimizer, state in zip(self.optimizers, states):
            rates = [group["full_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, rate in zip(optimizer.param_groups, rates):
                group["full_lr"] = rate


def flow_optimizers(named: Iterable[tuple[str, nn.Parameter]], lr: float, fused: bool) -> Optimizers:
    """Make the optimizers of a flow model with its text encoders.

    Muon trains the matrices of the blocks, except modulations. AdamW trains everything else.
    """
    muon, adam, text = [], [], []
    for name, parameter in named:
        if not name.startswith("flux."):
            text.append(parameter)
        elif "_blocks." in name and parameter.ndim == 2 and "mod" not in name:
            muon.append(parameter)
        else:
            adam.append(parameter)
    groups = [{"params": adam, "lr": lr}] + ([{"params": text, "lr": 0.6 * lr}] if text else [])
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    return Optimizers(Muon(muon, lr), adamw)


def low_rank_optimizers(model: nn.Module, lr: float, fused: bool) -> Optimizers:
    """Make the optimizer of low-rank changes, and of the biases beside them, which learn more slowly."""
    low_rank = [p for name, p in model.named_parameters() if ".lora_" in name]
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad]
    groups = [{"params": low_rank, "lr": lr}, {"params": biases, "lr": 0.3 * lr}]
    return Optimizers(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=fused))


def convolution_optimizers(model: nn.Module, lr: float, fused: bool) -> Optimizers:
    """Make the optimizers of a convolutional model.

    Muon trains the inner kernels. AdamW trains the first one, the last one and all vectors.
    """
    muon = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 3]
    chosen = {id(p) for p in muon}
    adam = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    return Optimizers(Muon(muon, lr, weight_decay=0.0), adamw)
