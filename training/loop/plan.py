"""The numbers of the recipe: how long each stage trains and on what batches. A toy run has its own."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from training.loop.cluster import Cluster
from training.loop.data import Pool, draw_pool
from training.loop.models import NANO, TOY, Sizes
from training.loop.optimizer import Optimizers
from training.loop.trainer import Budget, Schedule, Trainer


@dataclass(frozen=True)
class StagePlan:
    """The numbers of one stage. Sizes are for each process.

    Attributes:
        seconds: The time of training. Rendering the first data and compiling come on top.
        batch: The number of samples in an iteration.
        lr: The learning rate.
        scenes: The number of scenes to draw in advance. Adapters draw theirs while they train.
        capacity: The number of latents that the buffer holds.
        fresh: The number of new latents in an iteration.
        first: The number of latents before the first iteration.
        decay: The share of the time over which the learning rate falls to zero.
    """

    seconds: float
    batch: int
    lr: float
    scenes: int
    capacity: int = 0
    fresh: int = 0
    first: int = 0
    decay: float = 0.5


PLAN: dict[str, StagePlan] = {
    "autoencoder": StagePlan(126, 64, 1e-3, 8192, decay=0.6),
    "text": StagePlan(45, 1024, 1e-3, 300_000, decay=0.6),
    "flow128": StagePlan(50, 384, 1e-3, 200_000, 61_440, 128, 12_288, decay=0.0),
    "flow256": StagePlan(690, 320, 8e-4, 300_000, 61_440, 16, 8_192, decay=0.7),
    "guidance": StagePlan(40, 256, 3e-4, 60_000, 40_960, 32, 8_192, decay=0.8),
    "schnell": StagePlan(40, 256, 1e-3, 60_000, 16_384, 0, 16_384, decay=0.8),
    "kontext": StagePlan(400, 128, 1.5e-3, 0, 32_768, 16, 4_096, decay=0.6),
    "fill": StagePlan(240, 192, 1.5e-3, 0, 32_768, 16, 4_096, decay=0.6),
    "canny": StagePlan(160, 192, 1.5e-3, 0, 32_768, 16, 4_096, decay=0.6),
    "dinov2": StagePlan(52, 256, 1e-3, 150_000, decay=0.9),
    "measuring": StagePlan(280, 512, 2e-3, 600_000, decay=0.9),
}
TOY_PLAN: dict[str, StagePlan] = {
    "autoencoder": StagePlan(1.5, 4, 1e-3, 8, decay=0.6),
    "text": StagePlan(1.0, 4, 1e-3, 24),
    "flow128": StagePlan(1.0, 4, 1e-3, 24, 8, 4, 8, decay=0.0),
    "flow256": StagePlan(1.0, 4, 1e-3, 24, 8, 4, 8),
    "guidance": StagePlan(1.0, 4, 3e-4, 24, 8, 4, 8),
    "schnell": StagePlan(1.0, 4, 1e-3, 24, 8, 0, 8),
    "kontext": StagePlan(1.0, 4, 1e-3, 0, 8, 4, 8),
    "fill": StagePlan(1.0, 4, 1e-3, 0, 8, 4, 8),
    "canny": StagePlan(1.0, 4, 1e-3, 0, 8, 4, 8),
    "dinov2": StagePlan(1.0, 4, 1e-3, 24),
    "measuring": StagePlan(1.0, 4, 2e-3, 24),
}
STAGES: tuple[str, ...] = (
    "tokenizers", "autoencoder", "text", "flow128", "flow256", "guidance", "schnell", "kontext", "fill",
    "canny", "export", "dinov2", "measuring",
)  # fmt: skip
ADAPTERS: tuple[str, ...] = ("kontext", "fill", "canny")
SIDE = 256


@dataclass(frozen=True)
class Work:
    """The settings and places of a training, for its stages.

    Attributes:
        cluster: The processes it runs in.
        folder: The folder of its files.
        budget: How long the call may take.
        sizes: The sizes of the models.
        plan: The numbers of each stage. If None, they are those of `PLAN`.
        side: The side of the images in pixels.
        begin: The folder of exported files to train further. If None, training starts from nothing.
    """

    cluster: Cluster
    folder: Path
    budget: Budget
    sizes: Sizes = NANO
    plan: dict[str, StagePlan] | None = None
    side: int = SIDE
    begin: Path | None = None

    @classmethod
    def toy(cls, cluster: Cluster, folder: Path, budget: Budget) -> "Work":
        """Make a run that takes seconds a stage, to see whether everything runs."""
        return cls(cluster, folder, budget, TOY, TOY_PLAN, side=64)

    def plan_for(self, stage: str) -> StagePlan:
        """Return the numbers of a stage."""
        return (self.plan or PLAN)[stage]

    def stretched(self, factor: float) -> "Work":
        """Multiply the training time of every stage."""
        plan = {
            name: replace(stage, seconds=stage.seconds * factor)
            for name, stage in (self.plan or PLAN).items()
        }
        return replace(self, plan=plan)

    @property
    def tokenizers(self) -> Path:
        """The folder of the tokenizers."""
        return self.folder / "tokenizers"

    def result(self, stage: str) -> Path:
        """Name the file of the averaged weights that a complete stage writes."""
        return self.folder / f"{stage}.pt"

    def trainer(
        self, stage: str, model: nn.Module, optimizers: Optimizers, average_decay: float = 0.995
    ) -> Trainer:
        """Make the trainer of a stage."""
        plan = self.plan_for(stage)
        schedule = Schedule(plan.seconds, plan.decay or 1e-9)  # which divides by the second
        places = self.cluster, self.folder, self.budget
        return Trainer(stage, model, optimizers, schedule, *places, average_decay=average_decay)

    def pool(self, stage: str) -> Pool:
        """Draw the scenes of a stage. Every process draws others."""
        scenes, cores = self.plan_for(stage).scenes, (os.cpu_count() or 1) // self.cluster.world
        processes = max(1, min(16, cores, scenes // 1000))
        seed = 100 * STAGES.index(stage) + self.cluster.rank
        return draw_pool(scenes, self.tokenizers, seed, processes=processes)
