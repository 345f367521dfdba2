"""Stage "schnell": a student that needs four steps, no shift and no guidance input, as a low-rank difference.

The student starts as the distilled model with its guidance of 3.5 folded into a bias. It learns low-rank
changes of every matrix (LoRA, arXiv 2106.09685), small enough to ship beside the model that they change. From
states that it reaches itself, it learns to go in one step through a quarter of the schedule, to where the
teacher arrives in several.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.model import Flux
from training.loop.data import Latents, positions
from training.loop.models import Generator, Sizes, build_flux, text_ids
from training.loop.optimizer import low_rank_optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.stages.autoencoder import load_autoencoder
from training.stages.flow import add_noise, autocast, load_generator, make_latents, without_guidance

LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
TEACHER_STEPS = (6, 5, 4, 4)  # in each quarter, the noisiest first
FROM_DATA = 0.2  # share of states that are add_noise data instead of the student's own


class LoraLinear(nn.Module):
    """A linear layer with a low-rank change of its matrix. The matrix is frozen, the bias is not."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias.requires_grad_(True)
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        # Two products more on the activations would cost more than the whole matrix's gradient.
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


def add_lora(flux: Flux, rank: int) -> Flux:
    """Replace every linear layer of the model, in place, by one that learns a low-rank change."""
    flux.requires_grad_(False)
    for module in list(flux.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, rank).to(child.weight.device))
    return flux


def lora_weights(weights: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect the student's differences to its base, under the names of FLUX.1's LoRA files.

    These are lora_A, lora_B, and the differences of the biases beside them.
    """
    file = {}
    for name, value in weights.items():
        stem = name.rpartition(".")[0]
        if name.endswith((".lora_A", ".lora_B")):
            file[name + ".weight"] = value
        elif name.endswith(".bias") and stem + ".lora_A" in weights:
            file[stem + ".lora_B.bias"] = value - base[name]
    return file


def merged(base: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the student's differences into its base, which `without_guidance` makes."""
    weights = {name: value.clone() for name, value in base.items()}
    for name, value in lora.items():
        if name.endswith(".lora_B.weight"):
            stem = name.removesuffix(".lora_B.weight")
            weights[stem + ".weight"] += value.float() @ lora[stem + ".lora_A.weight"].float()
        elif name.endswith(".lora_B.bias"):
            weights[name.removesuffix(".lora_B.bias") + ".bias"] += value.float()
    return weights


def build_without_guidance(sizes: Sizes, weights: dict[str, Tensor]) -> Flux:
    """Build a transformer without guidance input from weights."""
    flux = build_flux(sizes.flux)
    flux.load_state_dict(weights)
    return flux


class Distillation:
    """The student's loss: it has to go in one step to where the teacher arrives in several.

    Args:
        work: The training.
        latents: Latents of scenes, with their captions.
        generator: Encodes the captions.
        teacher: The model to learn from.
        student: The model that learns.
    """

    def __init__(self, work: Work, latents: Latents, generator: Generator, teacher: Flux, student: Flux):
        self.latents, self.generator, self.teacher, self.student = latents, generator, teacher, student
        self.batch, self.device = work.plan_for("schnell").batch, work.cluster.device
        self.img_ids = positions(work.side, work.side, self.device)
        self.txt_ids = text_ids(self.device)
        self.levels = torch.tensor(LEVELS, device=self.device)
        self.steps = torch.tensor(TEACHER_STEPS, device=self.device)

    def loss(self) -> Tensor:
        """Compute the loss of one batch, each row in a random quarter of the schedule."""
        clean, t5, clip = self.latents.batch(self.batch)
        quarter = torch.randint(4, (self.batch,), device=self.device)
        begin, end = self.levels[quarter], self.levels[quarter + 1]
        with torch.no_grad(), autocast(self.device):
            txt, vec = self.generator.text(t5, clip)
            x = self.states(clean, quarter, txt, vec)
            target = (self.arrivals(x, quarter, txt, vec) - x) / (end - begin)[:, None, None]
        with autocast(self.device):
            velocity = self.velocity(self.student, x, begin, txt, vec)
        return F.mse_loss(velocity, target)

    def velocity(self, flux: Flux, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        """Compute a model's velocity of the latents `B I 64` at noise levels `B`."""
        return flux(x, self.img_ids, txt, self.txt_ids, t, vec).float()

    def states(self, clean: Tensor, quarter: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        """Draw latents at the starts of the quarters: on the student's own path, or data with noise."""
        x = torch.randn_like(clean)
        for step in range(3):
            t = self.levels[step].expand(self.batch).contiguous()
            velocity = self.velocity(self.student, x, t, txt, vec)
            moved = x + (self.levels[step + 1] - self.levels[step]) * velocity
            x = torch.where((step < quarter)[:, None, None], moved, x)
        from_data = (torch.rand(self.batch, device=self.device) < FROM_DATA)[:, None, None]
        return torch.where(from_data, add_noise(clean, self.levels[quarter])[0], x)

    def arrivals(self, x: Tensor, quarter: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        """Take the teacher's steps from these latents to the ends of their quarters."""
        begin, end, count = self.levels[quarter], self.levels[quarter + 1], self.steps[quarter]
        for step in range(max(TEACHER_STEPS)):
            t = begin + (end - begin) * (step / count).clamp(max=1)
            t_next = begin + (end - begin) * ((step + 1) / count).clamp(max=1)
            x = x + (t_next - t)[:, None, None] * self.velocity(self.teacher, x, t, txt, vec)
        return x


def train_schnell(work: Work) -> bool:
    """Train the four-step student. Return False if the call's budget ran out first."""
    plan, device = work.plan_for("schnell"), work.cluster.device
    torch.manual_seed(2)
    latents = make_latents(work, "schnell", load_autoencoder(work), work.side)
    generator = load_generator(work, "guidance", guidance=True).eval().requires_grad_(False)
    base = without_guidance({name: value.detach() for name, value in generator.flux.state_dict().items()})
    teacher = build_without_guidance(work.sizes, base).to(device).eval().requires_grad_(False)
    student = add_lora(build_without_guidance(work.sizes, base).to(device), work.sizes.lora_rank)
    optimizers = low_rank_optimizers(student, plan.lr, fused=device.type == "cuda")
    trainer = work.trainer("schnell", student, optimizers, average_decay=0.98)
    # Not compiled: that would take as long as the stage.
    distillation = Distillation(work, latents, generator, teacher, student)
    if not trainer.run(distillation.loss, plan.batch):
        return False
    if work.cluster.first:
        save_atomically(lora_weights(trainer.averaged(), base), work.result("schnell"))
    return True
