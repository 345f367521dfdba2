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
from training.loop.data import positions
from training.loop.models import Sizes, build_flux, text_ids
from training.loop.optimizer import Optimizers
from training.loop.plan import Work
from training.loop.trainer import Schedule, Trainer, save_atomically
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
        self.bias = linear.bias
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        # Two products more on the activations would cost more than the whole matrix's gradient.
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


def add_lora(flux: Flux, rank: int) -> Flux:
    """Replaces every linear layer of the model, in place, by one that learns a low-rank change."""
    flux.requires_grad_(False)
    for module in list(flux.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child.to(child.weight.device), rank).to(child.weight.device))
                getattr(module, name).bias.requires_grad_(True)
    return flux


def lora_weights(weights: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collects the student's differences to its base, under the names of FLUX.1's LoRA files.

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
    """Merges the student's differences into its base, which `without_guidance` makes."""
    weights = {name: value.clone() for name, value in base.items()}
    for name, value in lora.items():
        if name.endswith(".lora_B.weight"):
            stem = name.removesuffix(".lora_B.weight")
            weights[stem + ".weight"] += value.float() @ lora[stem + ".lora_A.weight"].float()
        elif name.endswith(".lora_B.bias"):
            weights[name.removesuffix(".lora_B.bias") + ".bias"] += value.float()
    return weights


def build_without_guidance(sizes: Sizes, weights: dict[str, Tensor]) -> Flux:
    """Builds a transformer without guidance input from weights."""
    flux = build_flux(sizes.flux)
    flux.load_state_dict(weights)
    return flux


def train_schnell(work: Work) -> bool:
    """Trains the four-step student. Returns False if the call's budget ran out first."""
    plan, device, batch = work.plan_for("schnell"), work.cluster.device, work.plan_for("schnell").batch
    torch.manual_seed(2)
    latents = make_latents(work, "schnell", load_autoencoder(work), work.side)
    generator = load_generator(work, "guidance", guidance=True).eval().requires_grad_(False)
    base = without_guidance({name: value.detach() for name, value in generator.flux.state_dict().items()})
    teacher = build_without_guidance(work.sizes, base).to(device).eval().requires_grad_(False)
    student = build_without_guidance(work.sizes, base).to(device)
    student = add_lora(student, work.sizes.lora_rank)
    low_rank = [p for name, p in student.named_parameters() if ".lora_" in name]
    biases = [p for name, p in student.named_parameters() if name.endswith(".bias")]
    groups = [{"params": low_rank, "lr": plan.lr}, {"params": biases, "lr": 0.3 * plan.lr}]
    adamw = torch.optim.AdamW(
        groups, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    schedule = Schedule(plan.seconds, plan.decay)
    trainer = Trainer(
        "schnell",
        student,
        Optimizers(adamw),
        schedule,
        work.cluster,
        work.folder,
        work.budget,
        average_decay=0.98,
    )
    # Not compiled: that would take as long as the stage.
    img_ids, txt_ids = positions(work.side, work.side, device), text_ids(device)
    levels = torch.tensor(LEVELS, device=device)
    steps = torch.tensor(TEACHER_STEPS, device=device)

    def velocity_of(flux: Flux, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        return flux(x, img_ids, txt, txt_ids, t, vec).float()

    def loss() -> Tensor:
        clean, t5, clip = latents.batch(batch)
        quarter = torch.randint(4, (batch,), device=device)
        begin, end = levels[quarter], levels[quarter + 1]
        with torch.no_grad(), autocast(device):
            txt, vec = generator.text(t5, clip)
            x = torch.randn_like(clean)
            for step in range(3):  # the student's own path to the start of the quarter
                velocity = velocity_of(student, x, levels[step].expand(batch).contiguous(), txt, vec)
                moved = x + (levels[step + 1] - levels[step]) * velocity
                x = torch.where((step < quarter)[:, None, None], moved, x)
            from_data = (torch.rand(batch, device=device) < FROM_DATA)[:, None, None]
            x = torch.where(from_data, add_noise(clean, begin)[0], x)
            arrived, count = x, steps[quarter]
            for step in range(max(TEACHER_STEPS)):
                t = begin + (end - begin) * (step / count).clamp(max=1)
                t_next = begin + (end - begin) * ((step + 1) / count).clamp(max=1)
                arrived = arrived + (t_next - t)[:, None, None] * velocity_of(teacher, arrived, t, txt, vec)
            target = (arrived - x) / (end - begin)[:, None, None]
        with autocast(device):
            velocity = student(x, img_ids, txt, txt_ids, begin, vec)
        return F.mse_loss(velocity.float(), target)

    if not trainer.run(loss, batch):
        return False
    if work.cluster.first:
        learned = trainer.averaged()
        save_atomically(lora_weights(learned, base), work.result("schnell"))
    return True
