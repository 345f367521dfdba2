"""The training itself: factors, optimiser, one step after another, and the state between two steps.

Each step's randomness is drawn from the seed and the step's number alone. So the state needs no generator's,
and a training that resumes takes the same steps as one that was never stopped.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flux.errors import InputError
from flux.files import write_bytes
from flux.inputs import Condition
from flux.lora.adapters import LoraLinear
from flux.lora.dataset import TrainingSet
from flux.lora.features import Features
from flux.lora.step import context_condition, noise_levels, noisy, velocity_loss
from flux.model import Flux, Inputs
from flux.runtime.parallel import ProcessGroup
from flux.sampling import image_ids
from flux.settings.train import TrainSettings
from flux.specs import ModelSpec
from flux.weights.checkpoint import open_checkpoint
from flux.weights.save import safetensors_bytes

LARGEST_NORM = 1.0  # of the gradients of a step; longer ones are scaled down
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by its own names


class Trainer:
    """A LoRA in training.

    Args:
        settings: The training.
        spec: The model.
        model: It, with adapters, on the device.
        adapters: Its trained layers by module.
        training: The examples.
        features: Their latents and texts.
        group: The processes that share each batch.

    Attributes:
        step: Number of steps taken.
        losses: The loss of each.
    """

    def __init__(
        self,
        settings: TrainSettings,
        spec: ModelSpec,
        model: Flux,
        adapters: Mapping[str, LoraLinear],
        training: TrainingSet,
        features: Features,
        group: ProcessGroup,
    ):
        self.settings, self.spec, self.model, self.adapters = settings, spec, model, adapters
        self.training, self.features, self.group = training, features, group
        self.factors = {
            f"{module}.{name}": factor
            for module, adapter in adapters.items()
            for name, factor in (("down", adapter.down), ("up", adapter.up))
        }
        self.device = next(iter(self.factors.values())).device
        self.optimizer = torch.optim.AdamW(self.factors.values(), lr=settings.learning_rate)
        self.step, self.losses = 0, list[float]()
        self._epoch, self._batches = 0, training.batches(settings.seed, 0, settings.batch_size)

    def take_step(self) -> float:
        """Train on the next batch, and return its loss.

        Raises:
            InputError: The loss is no number any more.
        """
        numbers = self._batch()
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, self.step))
        latents = torch.cat([self.features.latents[number] for number in numbers])
        draws = torch.randn(len(numbers), generator=generator)
        dropped = torch.rand(len(numbers), generator=generator) < self.settings.caption_dropout
        noise = torch.randn(latents.shape, generator=generator)
        # This process's share of the rows; all were drawn, so that shares together are the whole batch.
        own = slice(self.group.rank, None, self.group.count)
        loss = torch.zeros((), device=self.device)
        if numbers[own]:
            levels = noise_levels(draws, latents.shape[1], self.spec, latents.dtype)[own]
            inputs = self._inputs(numbers[own], dropped.tolist()[own], latents[own], noise[own], levels)
            velocity = (noise[own] - latents[own].float()).to(self.device)
            loss = velocity_loss(self.model, inputs, velocity).sum() / len(numbers)
            loss.backward()
        value = self._share(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"Got a loss of {value} in step {self.step + 1}: give a smaller learning_rate than "
                f"{self.settings.learning_rate:g}"
            )
        torch.nn.utils.clip_grad_norm_(self.factors.values(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(value)
        return value

    def _batch(self) -> list[int]:
        """The numbers of the next step's examples."""
        epoch, index = divmod(self.step, len(self._batches))
        if epoch != self._epoch:
            settings = self.settings
            self._epoch = epoch
            self._batches = self.training.batches(settings.seed, epoch, settings.batch_size)
        return self._batches[index]

    def _inputs(
        self, numbers: Sequence[int], dropped: Sequence[bool], latents: Tensor, noise: Tensor, levels: Tensor
    ) -> Inputs:
        device, dtype, example = self.device, latents.dtype, self.training.examples[numbers[0]]
        texts = ["" if drop else self.training.examples[n].caption for n, drop in zip(numbers, dropped)]
        txt = torch.cat([self.features.txt[text] for text in texts]).to(device)
        rows = len(numbers)
        guidance = None
        if self.model.params.guidance_embed:
            guidance = torch.full((rows,), self.settings.training_guidance, device=device, dtype=dtype)
        condition = Condition()
        if self.features.contexts:
            context = torch.cat([self.features.contexts[number] for number in numbers])
            condition = context_condition(context, *example.size, device)
        return Inputs(
            noisy(latents, noise, levels).to(device, dtype),
            image_ids(rows, example.height, example.width, device),
            txt,
            torch.zeros(rows, txt.shape[1], 3, device=device),
            levels.to(device, dtype),
            torch.cat([self.features.vec[text] for text in texts]).to(device),
            guidance,
            condition,
        )

    def _share(self, loss: Tensor) -> float:
        """Sum the gradients of all processes in place, and return the sum of the losses."""
        if self.group.count == 1:
            return float(loss)
        for factor in self.factors.values():
            if factor.grad is None:  # this process had no row
                factor.grad = torch.zeros_like(factor)
        grads = [factor.grad for factor in self.factors.values() if factor.grad is not None]
        total = self.group.total(torch.cat([loss.view(1), *(grad.view(-1) for grad in grads)]))
        value, *parts = total.split([1, *(grad.numel() for grad in grads)])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        return float(value)

    # ---- the state

    def save(self, path: Path) -> None:
        """Write everything that the next steps depend on, whole or not at all.

        Raises:
            InputError: As `flux.files.write_bytes`.
        """
        tensors: dict[str, Tensor] = {**self.factors}
        for name, factor in self.factors.items():
            tensors |= {f"{name}.{moment}": self.optimizer.state[factor][moment] for moment in MOMENTS}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        write_bytes(path, safetensors_bytes(tensors))

    def load(self, path: Path) -> None:
        """Go to the state that `save` wrote.

        Raises:
            InputError: The file is damaged, that of another training, or has more steps than are to be taken.
        """
        checkpoint = open_checkpoint(path)
        tensors = {name: tensor.stored.read("cpu") for name, tensor in checkpoint.tensors.items()}
        wanted = {
            f"{name}{end}" for name in self.factors for end in ("", *(f".{moment}" for moment in MOMENTS))
        }
        if tensors.keys() != wanted | {"losses"} or any(
            tensors[name].shape != factor.shape for name, factor in self.factors.items()
        ):
            raise InputError(f"Got {path}, which is the state of another training: delete it to begin anew")
        self.losses = tensors["losses"].tolist()
        self.step = len(self.losses)
        if self.step > self.settings.steps:
            raise InputError(
                f"Got steps {self.settings.steps}, but {path} has taken {self.step}: give more, or another "
                "output_dir"
            )
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(tensors[name])
                moments = {moment: tensors[f"{name}.{moment}"].to(factor) for moment in MOMENTS}
                self.optimizer.state[factor] = {"step": torch.tensor(float(self.step)), **moments}


def _seed(seed: int, step: int) -> int:
    """The seed of a step's random numbers."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
