"""Samples of a LoRA in training, and the curves that show when it has learnt enough.

A sample's distance to the training images falls while the subject is learnt. Its distance to what the base
model makes of the same prompt and noise should stay small for prompts without the trigger: where it grows,
the LoRA leaks into other images. All distances are 1 minus the cosine of DINOv2's features.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO, StringIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux import sampling
from flux.captions.folder import mentions
from flux.files import write_bytes, write_text
from flux.images.io import read_image, save_image, to_pil
from flux.images.sheets import grid
from flux.inputs import Condition
from flux.lora.dataset import TrainingSet
from flux.lora.features import Features
from flux.lora.step import context_condition
from flux.metrics.features import PerceptualEncoder
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.runs.record import image_metadata
from flux.runtime.tiling import in_tiles
from flux.sampling import Conditioning
from flux.settings.resolved import ResolvedTrain
from flux.specs import ModelSpec

TABLE, PLOT, SHEET = "curves.csv", "curves.png", "samples.png"
SHEET_SIDE = 256
SMOOTHED = 25  # steps whose losses make one point of the curve
DIGITS = 5  # of a distance


@dataclass(frozen=True)
class Distances:
    """A line of the table: the distances of one sample.

    Attributes:
        step: The training step after which it was made.
        prompt: Its prompt.
        has_trigger: Whether the prompt has the trigger. Without any trigger, all prompts count.
        to_training: Its mean distance to the training images.
        to_nearest: The distance to the nearest of them.
        to_base: The distance to the base model's sample of the same prompt and noise.
    """

    step: int
    prompt: str
    has_trigger: bool
    to_training: float
    to_nearest: float
    to_base: float


class Sampler:
    """Makes samples, compares them, and writes both to the output folder.

    Args:
        settings: How to sample, and the folder.
        spec: The model.
        prompts: The prompts, with the trigger in its place.
        training: The training images, whose context images Kontext's samples get.
        features: Features of the prompts and of the training images.
        ae: The autoencoder, on the CPU while it is not used.
        encoder: The DINOv2.
        device: Where samples are made.
        dtype: The dtype that the models compute in.
    """

    def __init__(
        self,
        settings: ResolvedTrain,
        spec: ModelSpec,
        prompts: Sequence[str],
        training: TrainingSet,
        features: Features,
        ae: AutoEncoder,
        encoder: PerceptualEncoder,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.settings, self.spec, self.prompts, self.features = settings, spec, prompts, features
        self.training = training
        self.ae, self.encoder, self.device, self.dtype = ae, encoder, device, dtype
        self.folder = Path(settings.output_dir)
        self.rows: list[Distances] = []

    def resume(self, step: int) -> None:
        """Read what an earlier start has measured, up to this step."""
        if (self.folder / TABLE).is_file():
            self.rows = [row for row in read_curves(self.folder) if row.step <= step]

    def sample(self, model: Flux, step: int, losses: Sequence[float]) -> list[Path]:
        """Make the samples of a step, measure them, and write all of it.

        Args:
            model: The transformer with its factors, on the device.
            step: The number of training steps taken.
            losses: The loss of each.

        Returns:
            The paths of the images.

        Raises:
            InputError: A file cannot be written, or the base model's samples have been deleted.
        """
        images = [self._image(model, number) for number in range(len(self.prompts))]
        paths = [self._path(step, number) for number in range(len(images))]
        for number, (path, image) in enumerate(zip(paths, images)):
            seed = self.settings.seed + number
            save_image(
                image, path, image_metadata(self.settings, self.prompts[number], seed, training_step=step)
            )
        base = images if step == 0 else [read_image(self._path(0, n)) for n in range(len(images))]
        self.rows = [row for row in self.rows if row.step < step] + self._measured(step, images, base)
        self._write(losses)
        return paths

    def closest(self) -> Distances | None:
        """The mean of the step whose samples with the trigger are closest to the training images, if any."""
        with_trigger = [row for row in mean_of_steps(self.rows, True) if row.step > 0]
        return min(with_trigger, key=lambda row: row.to_training, default=None)

    def _path(self, step: int, number: int) -> Path:
        return self.folder / "samples" / f"step_{step:06}_{number}.png"

    @torch.inference_mode()
    def _image(self, model: Flux, number: int) -> Image.Image:
        """The sample of one prompt."""
        given, spec = self.settings, self.spec
        (width, height), condition = self._pair(number)
        seed = given.seed + number
        latent = sampling.get_noise(1, height, width, self.device, self.dtype, seed)
        negative = self._conditioning(given.negative_prompt) if given.true_cfg > 1 else None
        cond = self._conditioning(self.prompts[number], negative, given.true_cfg).with_condition(condition)
        levels = sampling.get_schedule(
            given.num_steps, height // 16 * (width // 16), spec.base_shift, spec.max_shift, spec.shifted
        )
        ids = sampling.image_ids(1, height, width, self.device)
        x = sampling.pack(latent)
        for step in sampling.sample(model, x, ids, cond, levels):
            x = step.latent
        latent = sampling.unpack(x, height, width).to(self.dtype)
        self.ae.to(self.device)
        pixels = in_tiles(self.ae.decode, latent, 8) if given.tiled else self.ae.decode(latent)
        self.ae.to("cpu")
        return to_pil(pixels[0].float().clamp(-1, 1))

    def _pair(self, number: int) -> tuple[tuple[int, int], Condition]:
        """The size of one prompt's sample, and its context image: of Kontext, those of a pair."""
        if not self.features.contexts:
            return (self.settings.width, self.settings.height), Condition()
        pair = self.training.pair_of(self.prompts[number], number)
        size = self.training.examples[pair].size
        return size, context_condition(self.features.contexts[pair], *size, self.device)

    def _conditioning(
        self, prompt: str, negative: Conditioning | None = None, true_cfg: float = 1.0
    ) -> Conditioning:
        txt, vec = (each[prompt].to(self.device) for each in (self.features.txt, self.features.vec))
        guidance = torch.full((1,), self.settings.guidance, device=self.device, dtype=self.dtype)
        ids = torch.zeros(1, txt.shape[1], 3, device=self.device)
        return Conditioning(txt, ids, vec, guidance, negative=negative, true_cfg=true_cfg)

    def _measured(
        self, step: int, images: Sequence[Image.Image], base: Sequence[Image.Image]
    ) -> list[Distances]:
        if self.features.dino is None:
            raise ValueError("samples need the features of the training images")
        own, of_base = (self.encoder.embed(each).cpu() for each in (images, base))
        to_training = 1 - own @ self.features.dino.T
        to_base: Tensor = 1 - (own * of_base).sum(dim=1)
        trigger, rows = self.settings.trigger, []
        for prompt, *distances in zip(self.prompts, to_training.mean(1), to_training.amin(1), to_base):
            has_trigger = trigger is None or mentions(prompt, trigger)
            # As the table has them, so that a start that resumes draws the same curves.
            rows.append(Distances(step, prompt, has_trigger, *(round(float(x), DIGITS) for x in distances)))
        return rows

    def _write(self, losses: Sequence[float]) -> None:
        text = StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(Distances)], lineterminator="\n")
        table.writeheader()
        for row in self.rows:
            values = {k: f"{v:.{DIGITS}f}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            table.writerow(values)
        write_text(self.folder / TABLE, text.getvalue())
        plot_curves(self.rows, losses, self.folder / PLOT)
        self._write_sheet()

    def _write_sheet(self) -> None:
        steps = sorted({row.step for row in self.rows})
        images = [
            [read_image(self._path(step, number)) for number in range(len(self.prompts))] for step in steps
        ]
        for row in images:
            for image in row:
                image.thumbnail((SHEET_SIDE, SHEET_SIDE))
        captions = [list(self.prompts), *([""] * len(self.prompts) for _ in steps[1:])]
        save_image(grid(images, captions, [f"step {step}" for step in steps]), self.folder / SHEET)


def read_curves(folder: Path) -> list[Distances]:
    """Read the table of a training's output folder."""
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        return [
            Distances(
                int(row["step"]),
                row["prompt"],
                row["has_trigger"] == "True",
                *(float(row[name]) for name in ("to_training", "to_nearest", "to_base")),
            )
            for row in csv.DictReader(file)
        ]


def mean_of_steps(rows: Sequence[Distances], has_trigger: bool) -> list[Distances]:
    """Average the distances of the prompts with or without the trigger, for each step that has any."""
    found = []
    for step in sorted({row.step for row in rows}):
        group = [row for row in rows if row.step == step and row.has_trigger == has_trigger]
        if group:
            names = ("to_training", "to_nearest", "to_base")
            means = (sum(getattr(row, name) for row in group) / len(group) for name in names)
            found.append(Distances(step, "", has_trigger, *means))
    return found


def plot_curves(rows: Sequence[Distances], losses: Sequence[float], path: Path) -> None:
    """Draw the distances and the loss over the training steps.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    to_training, to_base, loss = figure.subplots(1, 3)
    for has_trigger, label, colour in (
        (True, "prompts with the trigger", "#d9772b"),
        (False, "other prompts", "#1f6f9f"),
    ):
        means = mean_of_steps(rows, has_trigger)
        steps = [row.step for row in means]
        if means:
            to_training.plot(steps, [row.to_training for row in means], "o-", color=colour, label=label)
            to_base.plot(steps, [row.to_base for row in means], "o-", color=colour, label=label)
    to_training.set_title("distance to the training images", fontsize=10)
    to_base.set_title("distance to the base model's samples", fontsize=10)
    loss.set_title(f"loss, mean of {SMOOTHED} steps", fontsize=10)
    whole = len(losses) // SMOOTHED
    means = torch.tensor(losses[: whole * SMOOTHED]).view(whole, SMOOTHED).mean(dim=1).tolist()
    loss.plot([SMOOTHED * (number + 1) for number in range(whole)], means, color="#7a5aa6")
    for axes in (to_training, to_base, loss):
        axes.set_xlabel("training steps")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    to_training.legend(fontsize=8, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
