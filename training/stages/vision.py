"""Stages "dinov2" and "measuring": the models that recognize what images show.

The Dinov2Model ships as flux-nano's perceptual encoder. The measuring model is a small convolutional model,
trained on other scenes, for `training.evaluate` and `training.judge`. It lies in this folder, in 8 bits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop.models import (
    DINO_SIDE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sizes,
    build_dinov2,
    channels_last,
)
from training.loop.optimizer import Optimizers, convolution_optimizers
from training.loop.plan import Work
from training.loop.trainer import save_atomically
from training.scenes.labels import (
    NUM_COLOURS,
    NUM_COUNTS,
    NUM_OBJECTS,
    NUM_PLACES,
    NUM_TIMES,
    Labels,
    labels_of,
)
from training.scenes.render import Renderer
from training.stages.export import export_dinov2, export_judge
from training.stages.flow import autocast

_HEADS = {
    "objects": NUM_OBJECTS, "worn": NUM_OBJECTS, "colours": NUM_COLOURS, "place": NUM_PLACES,
    "time": NUM_TIMES, "count": NUM_COUNTS, "x": NUM_OBJECTS,
}  # fmt: skip


@dataclass
class Recognition:
    """The things that a model recognizes in images: logits, and where objects stand (0..1 of the width).

    The fields and shapes are those of `Labels`; place, time and count are logits of each class.
    """

    objects: Tensor
    worn: Tensor
    colours: Tensor
    place: Tensor
    time: Tensor
    count: Tensor
    x: Tensor


class Heads(nn.Module):
    """One linear layer from features to everything in a `Recognition`."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, sum(_HEADS.values()))

    def forward(self, features: Tensor) -> Recognition:
        parts = self.linear(features).float().split(list(_HEADS.values()), dim=-1)
        return Recognition(*parts[:-1], x=0.5 + parts[-1])


def recognition_loss(seen: Recognition, labels: Labels) -> Tensor:
    """Sum the losses of all heads, weighted to similar sizes."""
    binary = F.binary_cross_entropy_with_logits
    displacement = (
        F.smooth_l1_loss(seen.x, labels.x, reduction="none", beta=0.05) * labels.objects
    ).sum() / labels.objects.sum()
    return (
        60 * binary(seen.objects, labels.objects)
        + 30 * binary(seen.worn, labels.worn)
        + 10 * binary(seen.colours, labels.colours)
        + F.cross_entropy(seen.place, labels.place)
        + F.cross_entropy(seen.time, labels.time)
        + F.cross_entropy(seen.count, labels.count)
        + 10 * displacement
    )


def normalized(images: Tensor) -> Tensor:
    """Normalize images in 0..1 as Dinov2Model expects them."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)


class DinoClassifier(nn.Module):
    """The Dinov2Model with heads on its class token, so that the token learns all that they need."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.dinov2 = build_dinov2(sizes)
        self.heads = Heads(sizes.dino_width)

    def forward(self, images: Tensor) -> Recognition:
        return self.heads(self.dinov2(pixel_values=normalized(images)).pooler_output)


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, in_width: int, out_width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, out_width)
        self.short = nn.Conv2d(in_width, out_width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.short(x) + h)


class MeasuringModel(nn.Module):
    """Recognizes what images `B 3 128 128` in 0..1 show, with logits of the subjects' mask, `B 1 32 32`."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        w = sizes.measuring_width
        self.first = nn.Conv2d(3, w, 3, 2, 1)
        self.fine = Residual(w, 2 * w, 2)
        self.middle = nn.Sequential(Residual(2 * w, 3 * w, 2), Residual(3 * w, 3 * w, 1))
        self.coarse = nn.Sequential(Residual(3 * w, 5 * w, 2), Residual(5 * w, 5 * w, 1))
        # Not pooled, since it matters where things stand.
        self.places = nn.Conv2d(5 * w, w, 1)
        self.hidden = nn.Linear(2 * 5 * w + 64 * w, 512)
        self.heads = Heads(512)
        self.mask = nn.Sequential(nn.Conv2d(10 * w, 2 * w, 3, 1, 1), nn.ReLU(), nn.Conv2d(2 * w, 1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Recognition, Tensor]:
        fine = self.fine(F.relu(self.first((images - 0.5) / 0.25)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        features = (coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3)), self.places(coarse).flatten(1))
        seen = self.heads(F.relu(self.hidden(torch.cat(features, dim=1))))
        levels = [F.interpolate(level, size=fine.shape[-2:]) for level in (fine, middle, coarse)]
        return seen, self.mask(torch.cat(levels, dim=1)).float()


@torch.no_grad()
def recognize(model: MeasuringModel, images: Tensor) -> tuple[Recognition, Tensor]:
    """Recognize what images `B 3 H W` in 0..1 show, and mask their subjects, booleans `B 1 H W`."""
    small = F.interpolate(images, size=(DINO_SIDE, DINO_SIDE), mode="bilinear", antialias=True)
    parts = [model(part) for part in small.split(128)]
    names = Recognition.__dataclass_fields__
    recognition = Recognition(*(torch.cat([getattr(part[0], name) for part in parts]) for name in names))
    masks = F.interpolate(torch.cat([part[1] for part in parts]), size=images.shape[-2:], mode="bilinear")
    return recognition, masks > 0


def roughened(images: Tensor) -> Tensor:
    """Add some noise and blur, since generated images are never as clean as rendered ones."""
    strength = 0.06 * torch.rand(len(images), 1, 1, 1, device=images.device)
    images = images + torch.randn_like(images) * strength
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(images, soft, 0.8 * torch.rand(len(images), 1, 1, 1, device=images.device))


def train_dinov2(work: Work) -> bool:
    """Train and export the perceptual encoder. Return False if the call's budget ran out first."""
    plan, device = work.plan_for("dinov2"), work.cluster.device
    torch.manual_seed(3)
    model = DinoClassifier(work.sizes).to(device)
    adamw = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.02, fused=device.type == "cuda")
    trainer = work.trainer("dinov2", model, Optimizers(adamw))
    pool, renderer = work.pool("dinov2"), Renderer(device)

    def loss() -> Tensor:
        rows = pool.rows[torch.randint(len(pool), (plan.batch,))]
        with torch.no_grad():
            images = roughened(renderer(rows, DINO_SIDE, DINO_SIDE))
        with autocast(device):
            seen = model(images)
        return recognition_loss(seen, labels_of(rows, device))

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        model.load_state_dict(trainer.averaged())
        export_dinov2(model.dinov2.cpu(), work.folder / "assets" / "dinov2")
    return True


def train_measuring(work: Work) -> bool:
    """Train the measuring model. Return False if the call's budget ran out first."""
    plan, device = work.plan_for("measuring"), work.cluster.device
    torch.manual_seed(4)
    model = channels_last(MeasuringModel(work.sizes).to(device))
    optimizers = convolution_optimizers(model, plan.lr, fused=device.type == "cuda")
    trainer = work.trainer("measuring", model, optimizers)
    pool, renderer = work.pool("measuring"), Renderer(device)

    def loss() -> Tensor:
        rows = pool.rows[torch.randint(len(pool), (plan.batch,))]
        images, opacity, _ = renderer.with_masks(rows, DINO_SIDE, DINO_SIDE)
        with torch.no_grad():
            images = roughened(images).contiguous(memory_format=torch.channels_last)
            mask = F.avg_pool2d(opacity.amax(dim=1, keepdim=True), 4)
        with autocast(device):
            seen, logits = model(images)
        return recognition_loss(seen, labels_of(rows, device)) + 3 * F.binary_cross_entropy_with_logits(
            logits, mask
        )

    if not trainer.run(loss, plan.batch):
        return False
    if work.cluster.first:
        halves = {name: value.half() for name, value in trainer.averaged().items()}
        save_atomically(halves, work.result("measuring"))
        export_judge(halves, work.folder / "assets" / "judge.safetensors")
    return True


def load_measuring(work: Work) -> MeasuringModel:
    """Load the trained measuring model, frozen, to the device."""
    model = MeasuringModel(work.sizes)
    model.load_state_dict(torch.load(work.result("measuring"), map_location="cpu"))
    return model.to(work.cluster.device).eval().requires_grad_(False)
