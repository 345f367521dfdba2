"""The training loop of every stage: bounded in time, resumable, logged, with averaged weights."""

import csv
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.loop.cluster import Cluster
from training.loop.optimizer import Optimizers

WARM_UP = 200  # iterations
SHARE_EVERY = 500  # iterations; bfloat16 gradients let the processes' weights drift apart by rounding


@dataclass
class Budget:
    """How long this call may run. When the time is used up, stages end, or save their state and pause.

    Attributes:
        minutes: The time of the call.
        begin: When the call began, in seconds since the epoch.
        profile: Whether each stage writes what ten of its iterations spend time on, to `<stage>.profile.txt`.
    """

    minutes: float
    begin: float
    profile: bool = False

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.begin + 60 * self.minutes - time.time()


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a stage: a short rise, then flat, then linear to almost zero.

    Attributes:
        seconds: The time of the stage.
        decay: The share of the time over which the learning rate falls.
        floor: The factor at the end.
    """

    seconds: float
    decay: float = 0.5
    floor: float = 0.01

    def factor(self, iteration: int, spent: float) -> float:
        """Compute the factor of the learning rate after `spent` seconds."""
        rise = min(1.0, (iteration + 1) / WARM_UP)
        return rise * max(self.floor, min(1.0, (1 - spent / self.seconds) / self.decay))


class Trainer:
    """Trains a model until its stage's time is spent, or pauses when the call's budget is.

    Attributes:
        iteration: The number of iterations so far, over all calls.
        samples: The number of samples so far, over all calls.
        spent: The seconds of training so far, over all calls.
        average: The exponential moving average of the weights, by name, which a stage hands on.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizers: Optimizers,
        schedule: Schedule,
        cluster: Cluster,
        folder: Path,
        budget: Budget,
        clip: float = 1.0,
        average_every: int = 5,
        average_decay: float = 0.995,
    ):
        self.name, self.model, self.optimizers, self.schedule = name, model, optimizers, schedule
        self.cluster, self.folder, self.budget = cluster, folder, budget
        self.clip, self.average_every, self.average_decay = clip, average_every, average_decay
        self.iteration, self.samples, self.spent = 0, 0, 0.0
        self.parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.average = {n: p.detach().clone() for n, p in self.parameters}
        self.rows: list[tuple] = []
        if self.state_file.exists():
            self._load()
        cluster.broadcast([p.data for _, p in self.parameters])
        torch.manual_seed(1000 * (1 + cluster.rank) + self.iteration)

    @property
    def state_file(self) -> Path:
        """The file that a paused stage resumes from."""
        return self.folder / f"{self.name}.state.pt"

    @property
    def done(self) -> bool:
        """Whether the stage's time is spent."""
        return self.spent >= self.schedule.seconds

    def run(self, loss_of: Callable[[], Tensor], batch: int, after: Callable[[], None] | None = None) -> bool:
        """Train until the stage is complete or the budget is used up.

        Progress is measured in time. The first iteration, which compiles, costs the budget but not the stage.

        Args:
            loss_of: Computes the loss of one iteration.
            batch: The number of samples in an iteration.
            after: Called after every iteration.

        Returns:
            Whether the stage is complete.
        """
        bar = tqdm(total=round(self.schedule.seconds), initial=round(self.spent), desc=self.name, unit="s",
                   disable=not self.cluster.first, mininterval=5)  # fmt: skip
        total, count = torch.zeros((), device=self.cluster.device), 0
        mark, paused = None, False
        profiler = self._profiler()
        while not self.done:
            total += self._iterate(loss_of(), after)
            count += 1
            self.samples += batch * self.cluster.world
            if profiler:
                profiler.step()
            if self.iteration % 10 == 0 or mark is None:
                mark = self._add_time(mark)
                if self.iteration % 50 == 0 or self.done:
                    self._record(self.cluster.mean(total / count), bar)
                    total.zero_()
                    count = 0
                # Writing the state takes up to a quarter of a minute.
                if self.cluster.broadcast_number(self.budget.left) < 15:
                    paused = not self.done
                    break
        bar.close()
        if profiler:
            profiler.stop()
        self._save()
        return not paused

    def _iterate(self, loss: Tensor, after: Callable[[], None] | None) -> Tensor:
        """Update the weights by one iteration's loss. Return the loss."""
        parameters = [p for _, p in self.parameters]
        loss.backward()
        self.cluster.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizers.step(self.schedule.factor(self.iteration, self.spent))
        for parameter in parameters:
            parameter.grad = None
        if self.iteration % self.average_every == 0:
            self._average()
        if after:
            after()
        if self.iteration % SHARE_EVERY == SHARE_EVERY - 1:
            self.cluster.broadcast([p.data for p in parameters])
        self.iteration += 1
        return loss.detach()

    def _add_time(self, mark: float | None) -> float:
        """Add the time since `mark` to the stage's, in every process alike. Return the time now."""
        if self.cluster.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.time()
        self.spent += self.cluster.broadcast_number(now - mark if mark else 0.0)
        return now

    def _profiler(self) -> torch.profiler.profile | None:
        """Start a profiler of iterations 40 to 50 of this call, if the budget asks for one."""
        if not self.budget.profile or not self.cluster.first:
            return None

        def write(profiler: torch.profiler.profile) -> None:
            events, kinds = profiler.key_averages(), dict.fromkeys(("cpu", self.cluster.device.type))
            tables = [events.table(sort_by=f"self_{kind}_time_total", row_limit=40) for kind in kinds]
            (self.folder / f"{self.name}.profile.txt").write_text("\n".join(tables))

        self.folder.mkdir(parents=True, exist_ok=True)
        timing = torch.profiler.schedule(wait=35, warmup=5, active=10, repeat=1)
        profiler = torch.profiler.profile(schedule=timing, on_trace_ready=write)
        profiler.start()
        return profiler

    @torch.no_grad()
    def _average(self) -> None:
        # Short at first, so that the average soon forgets the random start.
        decay = min(self.average_decay, (self.iteration + 1) / (self.iteration + 50))
        averages = [self.average[name] for name, _ in self.parameters]
        weights = [p.detach() for _, p in self.parameters]
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def averaged(self) -> dict[str, Tensor]:
        """Return the model's state with the averaged weights."""
        return {name: x.detach() for name, x in (self.model.state_dict() | self.average).items()}

    def _record(self, loss: float, bar: tqdm) -> None:
        if loss != loss:
            raise FloatingPointError(
                f"The loss of {self.name} is no longer a number at iteration {self.iteration}"
            )
        speed = self.samples / max(self.spent, 1e-6)
        self.rows.append((self.iteration, round(self.spent, 1), self.samples, round(loss, 5)))
        bar.set_postfix(it=self.iteration, loss=f"{loss:.4f}", per_s=round(speed), refresh=False)
        bar.update(max(0, min(round(self.spent), bar.total) - bar.n))

    def _save(self) -> None:
        if self.cluster.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            state = {
                "net": self.model.state_dict(),
                "average": self.average,
                "optimizers": self.optimizers.state_dict(),
                "progress": (self.iteration, self.samples, self.spent),
                "rows": self.rows,
            }
            save_atomically(state, self.state_file)
            write_log(self.folder / f"{self.name}.csv", self.rows)
        self.cluster.barrier()

    def continue_from(self, state_file: Path) -> None:
        """Start with the weights, their average and the momenta at the end of another stage."""
        self._restore(torch.load(state_file, map_location=self.cluster.device))

    def _load(self) -> None:
        state = torch.load(self.state_file, map_location=self.cluster.device)
        self._restore(state)
        self.iteration, self.samples, self.spent = state["progress"]
        self.rows = state["rows"]

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["net"])
        self.optimizers.load_state_dict(state["optimizers"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def save_atomically(state: object, path: Path) -> None:
    """Save a file with torch.save. The old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def write_log(path: Path, rows: Sequence[tuple]) -> None:
    """Write the loss curve as CSV and, beside it, as an image."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("iteration", "seconds", "samples", "loss"))
        writer.writerows(rows)
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([row[1] for row in rows], [row[3] for row in rows], linewidth=1.2)
    axes.set(xlabel="seconds of training", ylabel="loss", title=path.stem)
    if min(row[3] for row in rows) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
