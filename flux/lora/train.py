"""Trains a LoRA: checks everything, forecasts, computes features once, trains, samples, saves.

OUTPUT/run.json                 settings, versions, the base's and the images' fingerprints
OUTPUT/features.safetensors     latents and text features
OUTPUT/state.safetensors        factors and optimiser after the last save: where a new start resumes
OUTPUT/lora_000250.safetensors  the LoRA after 250 steps, and so on
OUTPUT/lora.safetensors         the LoRA after the last step
OUTPUT/samples/, samples.png    samples on the way
OUTPUT/curves.csv, curves.png   their distances to the training images and to the base model's samples

A training may be stopped at any moment; started again, it resumes after the last save.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from flux.errors import InputError
from flux.lora.adapters import Target, add_adapters, find_targets, prepare_backward
from flux.lora.base import Base
from flux.lora.dataset import CONTEXT, TrainingSet, read_training_set
from flux.lora.features import Features, compute_features, features_key, read_features, write_features
from flux.lora.forecast import Forecast, Forecaster
from flux.lora.samples import Sampler
from flux.lora.saved import save_lora
from flux.lora.trainer import Trainer
from flux.metrics.features import PerceptualEncoder
from flux.runs.folder import ResumableFolder
from flux.runtime.devices import pick_device, pick_dtype
from flux.runtime.parallel import ProcessGroup, join
from flux.runtime.quantize import check_fp8_support
from flux.settings.complete import check_run, resolve
from flux.settings.resolved import ResolvedTrain
from flux.settings.train import TrainSettings
from flux.specs import ModelSpec, encoder_of, get_spec
from flux.vital_layers import find_vital_layers
from flux.vocabulary import warn_of_unknown_words
from flux.weights.find import find_model
from flux.weights.open_model import OpenModel

# These may differ between the starts of one training, since they do not change its steps.
FREE_FIELDS = {
    "output_dir", "images", "steps", "save_every", "sample_every", "device", "offload", "checkpointing",
    "parallel", "tiled", "metadata",
}  # fmt: skip
STATE, LORA = "state.safetensors", "lora.safetensors"
MOST_DEFAULT_PROMPTS = 2
LONGEST_WAIT = timedelta(days=7)  # for the first process, which alone encodes images and makes samples


@dataclass(frozen=True)
class TrainProgress:
    """A report of a running training.

    Attributes:
        step: The number of steps taken.
        steps: The number of all steps.
        loss: The loss of the last one.
        samples: The samples that were made after it.
    """

    step: int
    steps: int
    loss: float
    samples: list[Path]


@dataclass(frozen=True)
class Plan:
    """A training that has been checked, before anything loads.

    Attributes:
        settings: The settings.
        spec: The model.
        opened: Its files.
        training: The images and captions.
        layers: The trained layers, sorted.
        targets: The trained matrices.
        forecast: The memory and time that it needs.
        prompts: The prompts of the samples.
        group: The processes that share the work.
        device: Where this process computes.
        dtype: The dtype that the models compute in.
    """

    settings: ResolvedTrain
    spec: ModelSpec
    opened: OpenModel
    training: TrainingSet
    layers: tuple[int, ...]
    targets: list[Target]
    forecast: Forecast
    prompts: list[str]
    group: ProcessGroup
    device: torch.device
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.settings.output_dir)

    @property
    def texts(self) -> list[str]:
        """All texts that are encoded, each once."""
        others = [""] if self.settings.caption_dropout else []
        others += [self.settings.negative_prompt] if self.prompts and self.settings.true_cfg > 1 else []
        return list(dict.fromkeys([*self.training.captions, *self.prompts, *others]))

    @property
    def encoder(self) -> str:
        """The DINOv2 that compares samples."""
        return encoder_of(self.settings.encoder or self.settings.model)

    def about(self, step: int) -> dict[str, object]:
        """The metadata of the LoRA file after that step."""
        name = self.settings.model
        return {
            "modelspec.architecture": f"{'flux-nano' if self.spec.folder else 'flux-1-dev'}/lora",
            "software": "flux-stable-flow",
            "modelspec.license": f"a derivative of {name}: {self.spec.licence}",
            "base_model": name,
            "base_fingerprint": self.opened.fingerprint(),
            "trigger_word": self.settings.trigger or "",
            "layers": self.layers,
            "rank": self.settings.rank,
            "step": step,
            "settings": self.settings.recorded(),
        }


def train(settings: TrainSettings, on_progress: Callable[[TrainProgress], None] | None = None) -> Path:
    """Train a LoRA, or resume where the last start has saved.

    Args:
        settings: The training.
        on_progress: Called after each step. An exception from it ends the training; what was saved stays.

    Returns:
        The path of the LoRA after the last step.

    Raises:
        InputError: Something does not fit. It is raised before the first model loads, except where a file
            cannot be written or the loss is no number any more.
    """
    # A caller may have switched gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        return _run(make_plan(settings), on_progress)


def make_plan(given: TrainSettings) -> Plan:
    """Check a training and forecast what it needs. Nothing is loaded, and nothing written.

    Raises:
        InputError: Something does not fit.
    """
    settings, spec = resolve(given), get_spec(given.model)
    _check_model(given, spec)
    _check_folders(settings)
    training = read_training_set(settings, spec)
    if spec.vocabulary:
        warn_of_unknown_words(training.captions, spec.vocabulary)
    group = join(settings.parallel, settings.device, LONGEST_WAIT)
    device = group.device or pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device, spec)
    if settings.quantize == "fp8":
        check_fp8_support(device, dtype)
    opened = find_model(settings)
    opened.check()
    choice = "auto" if settings.layers == "vital" else settings.layers
    layers = find_vital_layers(choice, spec, opened.fingerprint())
    targets = find_targets(spec.params, layers, settings.parts, settings.rank, settings.alpha)
    texts = settings.sample_prompts
    if texts is None:
        texts = training.captions[:MOST_DEFAULT_PROMPTS]
    prompts = [settings.with_trigger(text) for text in texts]
    forecaster = Forecaster(settings, spec, opened, targets, training.largest, device, dtype)
    forecast, free = forecaster.fitting()
    print(forecast.line(settings.steps, free))
    return Plan(
        settings, spec, opened, training, tuple(sorted(layers)), targets, forecast, prompts, group, device,
        dtype,
    )  # fmt: skip


def _check_model(given: TrainSettings, spec: ModelSpec) -> None:
    """Raise InputError unless the model can be trained, at sizes that can be chosen."""
    whole = "flux-nano" if spec.folder else "flux-dev"
    if not spec.shifted:
        raise InputError(
            f"Got model {given.model!r}, which was distilled to few steps: training on it undoes that. "
            f"Train on {whole}, and add the LoRA to either"
        )
    if spec.condition not in (None, "kontext"):
        raise InputError(
            f"Got model {given.model!r}, which images steer: it cannot be trained here, train on {whole}"
        )
    if spec.condition and (given.width or given.height):
        raise InputError(
            f"Got width or height, but samples of {given.model} have the sizes of their context images: "
            "leave them out, or give sizes"
        )


def _check_folders(settings: TrainSettings) -> None:
    """Raise InputError if the next start would take samples.png for a training image."""
    images, output = Path(settings.images).resolve(), Path(settings.output_dir).resolve()
    if settings.sample_prompts != () and output in (images, images / CONTEXT):
        raise InputError(
            f"Got output_dir {settings.output_dir}, where the training images are: the next start would take "
            "samples for more of them, give another folder"
        )


def _run(plan: Plan, on_progress: Callable[[TrainProgress], None] | None) -> Path:
    """Load what is planned, and train."""
    check_run(plan.settings)
    _start_folder(plan)
    encoder = PerceptualEncoder.load(plan.encoder) if plan.prompts else None
    features = _features(plan, encoder)
    base = Base.load(plan.settings, plan.opened, plan.device, plan.dtype, plan.forecast.streamed)
    adapters = add_adapters(base.model, plan.targets, plan.settings.seed, plan.device)
    prepare_backward(base.model, plan.layers[0], plan.forecast.checkpointing)
    trainer = Trainer(plan.settings, plan.spec, base.model, adapters, plan.training, features, plan.group)
    if (plan.folder / STATE).is_file():
        trainer.load(plan.folder / STATE)
    sampler = None
    if encoder and plan.group.rank == 0:
        ae = plan.opened.load_autoencoder("cpu", plan.dtype)
        sampler = Sampler(
            plan.settings,
            plan.spec,
            plan.prompts,
            plan.training,
            features,
            ae,
            encoder,
            plan.device,
            plan.dtype,
        )
        sampler.resume(trainer.step)
    return _Loop(plan, base, trainer, sampler, on_progress).run()


def _start_folder(plan: Plan) -> None:
    """Write the record of a new training, or check that the folder's is the same.

    Raises:
        InputError: The folder holds another training.
    """
    folder = ResumableFolder(plan.folder, TrainSettings.demo, "a training", TrainSettings.program)
    fingerprints = {"checkpoint": plan.opened.fingerprint(), "training_images": plan.training.fingerprint}
    if folder.started:
        record = folder.record()
        differences = folder.differences(plan.settings, FREE_FIELDS)
        folder.refuse(differences | {name for name, own in fingerprints.items() if record.get(name) != own})
    elif plan.group.rank == 0:
        folder.write_record(plan.settings, **fingerprints)
    if plan.group.rank == 0:
        folder.remove_leftovers()


def _features(plan: Plan, encoder: PerceptualEncoder | None) -> Features:
    """Read the features of an earlier start, or compute them. The first process writes, the others wait."""
    texts = plan.texts
    about = [str(plan.dtype), plan.settings.t5, str(plan.settings.tiled), plan.encoder if encoder else ""]
    key = features_key(plan.training, plan.opened, texts, about)
    features = read_features(plan.folder, key, texts)
    if features is None and plan.group.rank == 0:
        features = compute_features(
            plan.settings, plan.opened, plan.training, texts, encoder, plan.device, plan.dtype
        )
        write_features(plan.folder, key, features)
    plan.group.total(torch.zeros(1, device=plan.device))
    features = features or read_features(plan.folder, key, texts)
    if features is None:
        raise InputError(f"Got {plan.folder}, which not all processes see: give a folder that they share")
    return features


class _Loop:
    """The steps of a training, with samples and files in between."""

    def __init__(
        self,
        plan: Plan,
        base: Base,
        trainer: Trainer,
        sampler: Sampler | None,
        on_progress: Callable[[TrainProgress], None] | None,
    ):
        self.plan, self.base, self.trainer, self.sampler = plan, base, trainer, sampler
        self.on_progress = on_progress

    def run(self) -> Path:
        """Take the steps that are left, and return the path of the final LoRA."""
        plan, trainer, settings = self.plan, self.trainer, self.plan.settings
        if trainer.step == 0:
            self._sample()
        bar = tqdm(total=settings.steps, initial=trainer.step, desc="train", unit="step")
        with bar:
            while trainer.step < settings.steps:
                self._until_next_stop(bar)
                self._save()
        path = plan.folder / LORA
        if plan.group.rank == 0:
            save_lora(path, trainer.adapters, plan.dtype, plan.about(trainer.step))
            if self.sampler and (closest := self.sampler.closest()):
                print(
                    f"closest to the training images: after {closest.step} steps, at a distance of "
                    f"{closest.to_training:.3f}"
                )
        return path

    def _until_next_stop(self, bar: tqdm) -> None:
        """Take steps until samples or files are due."""
        trainer, settings = self.trainer, self.plan.settings
        with self.base.on_device():
            while True:
                loss = trainer.take_step()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if self._due(settings.save_every) or self._due(settings.sample_every):
                    break
                self._report(loss, [])
        samples = self._sample() if self._due(settings.sample_every) else []
        self._report(loss, samples)

    def _due(self, every: int) -> bool:
        step = self.trainer.step
        return step % every == 0 or step == self.plan.settings.steps

    def _sample(self) -> list[Path]:
        """Make the samples of this step, where there are any."""
        if self.sampler is None:
            return []
        with self.base.on_device() as model:
            return self.sampler.sample(model, self.trainer.step, self.trainer.losses)

    def _report(self, loss: float, samples: list[Path]) -> None:
        if self.on_progress:
            settings = self.plan.settings
            self.on_progress(TrainProgress(self.trainer.step, settings.steps, loss, samples))

    def _save(self) -> None:
        """Write the LoRA, then the state: a start after a kill in between writes the same LoRA again."""
        plan, step = self.plan, self.trainer.step
        if plan.group.rank != 0 or not self._due(plan.settings.save_every):
            return
        path = plan.folder / f"lora_{step:06}.safetensors"
        save_lora(path, self.trainer.adapters, plan.dtype, plan.about(step))
        self.trainer.save(plan.folder / STATE)
