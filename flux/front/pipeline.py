"""A model by its name, and an image, an edit or a scan in one call each."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flux.attention.film import Film
from flux.attention.watch import check_watch, watch
from flux.editing.edit import check_edits, edit
from flux.editing.prepare import complete_edit, with_caption
from flux.front.arguments import read_arguments, read_file_arguments, read_model
from flux.images.io import ImageLike
from flux.loaded_model import LoadedModel, count_evaluations
from flux.results import EditResult, FilmResult, ImagesResult, ScanResult, SkipResult
from flux.scan.run import scan
from flux.scan.sweep import sweep
from flux.sessions.batches import generate_all
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, ScanSettings, SkipSettings
from flux.settings.edits import Edit, EditSettings
from flux.settings.effect import print_warnings
from flux.settings.files import read_prompts
from flux.weights.find import checkpoint_of

SweepSettings = TypeVar("SweepSettings", bound=SkipSettings)

AnyPath = str | os.PathLike[str]


class Pipeline:
    """One model, loaded, with its own defaults: size, steps and guidance need not be given.

    Layers are numbered over the whole model, double-stream blocks first. Wrong values raise
    `flux.errors.InputError`, a ValueError of one line, before anything is computed.

    Examples:
        >>> from flux import Pipeline
        >>> pipe = Pipeline.load("flux-nano")
        >>> images = pipe.generate("a dog on the grass", seed=7)
        >>> edits = pipe.edit("a dog on the grass", ["a cat on the grass"], seed=7)
        >>> scan = pipe.scan(["a dog on the grass"], layers=[0, 4, 9])

    A notebook shows what these calls return. `save` writes it as the demos do, with a run.json that repeats
    it.

    Attributes:
        settings: The model and how it runs.
        models: The `flux.loaded_model.LoadedModel`, which the functions of `flux.editing`, `flux.scan` and
            `flux.attention` take as `pipe`.
    """

    def __init__(self, models: LoadedModel, settings: ModelSettings):
        """Hold a model that is loaded already. Programs call `load` instead."""
        self.models, self.settings = models, settings

    def __repr__(self) -> str:
        changed = self.settings.model_dump(
            mode="json", exclude_defaults=True, exclude={"model", "device", "dtype"}
        )
        more = "".join(f", {name}={value!r:.60}" for name, value in changed.items())
        dtype = str(self.models.dtype).removeprefix("torch.")
        return f"<Pipeline {self.settings.model}, {self.models.device}, {dtype}{more}>"

    @classmethod
    def load(
        cls,
        model: str = "flux-nano",
        *,
        weights: AnyPath | None = None,
        ae_weights: AnyPath | None = None,
        t5_weights: AnyPath | None = None,
        clip_weights: AnyPath | None = None,
        text_encoders: AnyPath | None = None,
        lora: AnyPath | Sequence[AnyPath | Mapping[str, Any]] = (),
        device: str = "auto",
        dtype: str = "auto",
        offload: str = "none",
        quantize: str = "none",
        t5: str = "same",
        tiled: bool = False,
        compile: bool = False,
        **fields: Any,
    ) -> "Pipeline":
        """Find, download, check and load a model.

        Examples:
            >>> from flux import Pipeline
            >>> Pipeline.load("flux-nano-schnell", device="cpu", dtype="float32")
            <Pipeline flux-nano-schnell, cpu, float32>

        Args:
            model: Its name: one of `flux.specs.configs`, such as "flux-nano", "flux-dev" or "flux-schnell".
            weights: File or folder of the transformer, or of the whole model. If None, the package's own or
                the hub's, as for the next four.
            ae_weights: File or folder of the autoencoder.
            t5_weights: File or folder of the T5 encoder.
            clip_weights: File or folder of the CLIP encoder.
            text_encoders: Folder of both text encoders and their tokenizers.
            lora: LoRA files to add: a path, or a list of paths and of {"file": path, "weight": 0.8}.
            device: Where to run: "auto", "cpu", "cuda", "cuda:1" or "mps".
            dtype: What it computes in: "auto", "float32", "bfloat16" or "float16".
            offload: What waits in main memory: "none", "model", "blocks", or "auto" as free memory requires.
            quantize: The transformer in fewer bits: "none", "8bit", "4bit" or "fp8".
            t5: The T5 encoder as the other models ("same"), in "8bit", or on the "cpu".
            tiled: Whether images are decoded in tiles, in less memory.
            compile: Whether blocks are compiled: a slower start, faster steps.
            **fields: Any other field of `flux.settings.ModelSettings`, such as `lora_scale`. `num_steps`,
                `width` and other fields of a call are then the defaults of all calls.

        Raises:
            InputError: The model is unknown, or a file is missing or another model's. It is raised before
                the first network is loaded.
        """
        settings = read_model({
            "model": model, "weights": weights, "ae_weights": ae_weights, "t5_weights": t5_weights,
            "clip_weights": clip_weights, "text_encoders": text_encoders, "lora": lora, "device": device,
            "dtype": dtype, "offload": offload, "quantize": quantize, "t5": t5, "tiled": tiled,
            "compile": compile, **fields,
        })  # fmt: skip
        return cls(LoadedModel.load(resolve(settings)), settings)

    def generate(
        self,
        prompt: str | Sequence[str | Mapping[str, Any]],
        *,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        image: ImageLike | None = None,
        strength: float | None = None,
        context: ImageLike | Sequence[ImageLike] | None = None,
        fill: ImageLike | None = None,
        mask: ImageLike | None = None,
        control: ImageLike | None = None,
        redux: ImageLike | Sequence[ImageLike] | None = None,
        progress: bool = True,
        **fields: Any,
    ) -> ImagesResult:
        """Make one image of a prompt, or one of each prompt in a list.

        Examples:
            >>> from flux import Pipeline
            >>> pipe = Pipeline.load()
            >>> images = pipe.generate("a red car on the street", num_steps=4)
            >>> images
            <1 image of 256x256, flux-nano>
            >>> images[0].size
            (256, 256)

        Args:
            prompt: A text, or a list of texts and of {"prompt": ..., "seed": ...}.
            seed: Seed of the noise of the first image; each later one's is one higher.
            width: Width in pixels, rounded down to a multiple of 16. If None, the model's own.
            height: Height in pixels, likewise.
            num_steps: Number of steps. If None, the model's own.
            guidance: Distilled guidance. If None, the model's own.
            image: Start from this image (a path, a PIL image or a NumPy array) instead of from noise alone.
            strength: How much of the schedule then runs, above 0 and at most 1. If None, 0.8.
            context: Kontext: the image that the prompt is an instruction for, or a list of them.
            fill: Fill: the image of which a part is painted anew; its size is that of the result.
            mask: White where `fill` is painted anew. With `outpaint` instead, its surroundings are.
            control: Canny and Depth: the image whose edges or depth the result has.
            redux: Redux: the image to vary, or a list of images to mix.
            progress: Whether to show progress bars.
            **fields: Any other field of `flux.settings.GenerateSettings`: `true_cfg` with a
                `negative_prompt`, `batch_size`, `watermark`, `cache`, `outpaint`, `reference_strength`, ...

        Raises:
            InputError: A value cannot be used.
        """
        settings, conditions, given = read_arguments(GenerateSettings, self.settings, {
            "prompts": prompt, "seed": seed, "width": width, "height": height,
            "num_steps": num_steps, "guidance": guidance, "image": image, "strength": strength,
            "context": context, "fill": fill, "mask": mask, "control": control, "redux": redux, **fields,
        })  # fmt: skip
        settings = resolve(settings)
        print_warnings(settings, self.models.spec)
        models = self.models.steered(conditions, settings)
        images = list(generate_all(models, settings, given.one("image"), progress))
        return ImagesResult(settings, images, dict(models.timings), given.unfiled)

    def edit(
        self,
        prompt: str | None,
        edits: str | Sequence[str | Mapping[str, Any] | Edit],
        *,
        photo: ImageLike | None = None,
        mask: ImageLike | None = None,
        dose: str | None = None,
        vital_layers: str | AnyPath | Sequence[int] | None = None,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        progress: bool = True,
        **fields: Any,
    ) -> EditResult:
        """Make a reference and edits that keep what their prompts do not change.

        Examples:
            >>> from flux import Pipeline
            >>> pipe = Pipeline.load()
            >>> result = pipe.edit("a dog on the grass", ["a cat on the grass"], seed=7, num_steps=4)
            >>> result
            <1 edit of 'a dog on the grass', flux-nano>
            >>> result.edits[0].size == result.reference.size
            True

        Args:
            prompt: What the reference shows, or what is on the photograph. It may be None for a photograph
                with a `caption_model`.
            edits: What each edited image shows: a text, or a list of texts and of objects with numbers of
                their own, such as {"prompt": ..., "dose": "add", "then": ["a further turn"]}.
            photo: The photograph to edit (a path, a PIL image or a NumPy array). If None, the reference is
                generated.
            mask: White where edits may change the image (a path, a PIL image or a NumPy array, of bool too);
                or "auto", or "none". If None, as the dose says.
            dose: How much of the reference is injected: "auto", "balanced", "replace", "add", "scene" or
                "paper". If None, "auto", which finds a mask.
            vital_layers: A list of layers, a vital_layers.json, the name of a published set, or "auto". If
                None, "auto": those of a scan of these weights, else the model's own.
            seed: Seed of the noise that reference and edits share.
            width: Width in pixels, rounded down to a multiple of 16. If None, the model's own; for a
                photograph, of its shape.
            height: Height in pixels, likewise.
            num_steps: Number of steps. If None, the model's own.
            guidance: Distilled guidance. If None, the model's own.
            progress: Whether to show progress bars.
            **fields: Any other field of `flux.settings.EditSettings`: `weight`, `inject_until`, `inversion`,
                `paste_back`, `batch_size`, `true_cfg` with a `negative_prompt`, ...

        Raises:
            InputError: A value cannot be used.
        """
        settings, conditions, given = read_arguments(EditSettings, self.settings, {
            "prompt": prompt, "edits": edits, "photo": photo, "mask": mask, "dose": dose,
            "vital_layers": vital_layers, "seed": seed, "width": width, "height": height,
            "num_steps": num_steps, "guidance": guidance, **fields,
        })  # fmt: skip
        photograph = given.one("photo")
        settings, layers = complete_edit(settings, photograph, self._checkpoint)
        painted = conditions.mask or given.one("mask")
        print_warnings(settings, self.models.spec)
        check_edits(settings, layers, photograph, painted)
        settings = with_caption(settings, photograph)
        models = self.models.steered(conditions, settings)
        with count_evaluations(models) as evaluations:
            made = edit(models, settings, layers, photograph, painted, progress=progress)
        timings = dict(models.timings)
        return EditResult(settings, made.reference, made.edits, timings, evaluations(), given.unfiled)

    def skip(
        self,
        prompt: str | Sequence[str | Mapping[str, Any]],
        layers: int | str | Sequence[int] | Sequence[Sequence[int]] = "all",
        *,
        seed: int = 0,
        folder: AnyPath | None = None,
        progress: bool = True,
        **fields: Any,
    ) -> SkipResult:
        """Make the image of a prompt, and the same image with layers skipped.

        Examples:
            >>> from flux import Pipeline
            >>> pipe = Pipeline.load()
            >>> skipped = pipe.skip("a dog on the grass", [4, 9], seed=7, num_steps=4)
            >>> skipped
            <1 prompt with 2 layers skipped, flux-nano>
            >>> skipped.image(4).size
            (256, 256)

        Args:
            prompt: A text, or a list of texts and of {"prompt": ..., "seed": ...}.
            layers: A layer, a list of layers to skip one by one, a list of lists to skip together, or "all".
            seed: Seed of the noise of the first prompt; each later one's is one higher.
            folder: Folder to write to. A run that was stopped resumes there. If None, a temporary one.
            progress: Whether to show a progress bar.
            **fields: Any other field of `flux.settings.SkipSettings`: `num_steps`, `width`, `height`,
                `batch_size`, `scale`, ...

        Raises:
            InputError: A value cannot be used.
        """
        settings, files = self._read_sweep(SkipSettings, prompt, layers, seed, folder, fields)
        settings = resolve(settings)
        sweep(settings, self.models, progress=progress)
        return SkipResult(settings, files)

    def scan(
        self,
        prompts: str | Sequence[str | Mapping[str, Any]] | None = None,
        layers: int | str | Sequence[int] | Sequence[Sequence[int]] = "all",
        *,
        top: int | None = None,
        threshold: float | None = None,
        seed: int = 0,
        folder: AnyPath | None = None,
        progress: bool = True,
        **fields: Any,
    ) -> ScanResult:
        """Skip each layer, measure how much the images change, and find the vital layers.

        Examples:
            >>> from flux import Pipeline
            >>> pipe = Pipeline.load()
            >>> result = pipe.scan(["a dog on the grass"], [0, 4, 9], top=2, num_steps=4)
            >>> result
            <vital layers [0, 4] of flux-nano>

        Args:
            prompts: A text, or a list of texts and of {"prompt": ..., "seed": ...}. If None, the package's 64
                prompts, and the scan stops once the vital layers are settled.
            layers: As for `skip`.
            top: Vital are so many layers, the most vital ones.
            threshold: Vital are layers of this vitality or more. If None, and `top` too, vital are the layers
                above the largest gap.
            seed: Seed of the noise of the first prompt; each later one's is one higher.
            folder: Folder to write to. A scan that was stopped resumes there. If None, a temporary one.
            progress: Whether to show a progress bar.
            **fields: Any other field of `flux.settings.ScanSettings`: `num_steps`, `batch_size`, `metrics`,
                `seeds`, `workers`, ...

        Raises:
            InputError: A value cannot be used.
        """
        more: dict[str, Any] = {"top": top, "threshold": threshold}
        if top is None and threshold is None:
            more["gap"] = True
        if prompts is None:
            prompts, _ = read_prompts("prompts_nano.json" if self.models.spec.vocabulary else "prompts.json")
            more["stop_when"] = "stable"
        settings, files = self._read_sweep(ScanSettings, prompts, layers, seed, folder, more | fields)
        settings = resolve(settings)
        vital = scan(settings, self.models, progress=progress)
        return ScanResult(settings, files, vital)

    def watch(
        self,
        prompt: str,
        layers: int | Sequence[int] = (),
        *,
        words: str | Sequence[str] = (),
        at_steps: Sequence[int] = (),
        seed: int = 0,
        progress: bool = True,
        **fields: Any,
    ) -> FilmResult:
        """Make an image, and show each of its steps and what its layers attend to.

        Examples:
            >>> from flux import Pipeline
            >>> pipe = Pipeline.load()
            >>> film = pipe.watch("a dog on the grass", [4], words=["dog"], seed=7, num_steps=4)
            >>> film
            <4 steps of 'a dog on the grass', layers 4, flux-nano>
            >>> sorted(film.sheets)
            ['layers', 'steps', 'words']

        Args:
            prompt: What the image shows.
            layers: The layers whose attention is shown. If there are none, only the steps are.
            words: Words of the prompt to show it for. If there are none, all of them.
            at_steps: Steps to show it at, from 0. If there are none, the first, the middle and the last.
            seed: Seed of the noise.
            progress: Whether to show a progress bar.
            **fields: Any other field of `flux.settings.LayerSettings`: `num_steps`, `width`, `height`, ...

        Raises:
            InputError: A value cannot be used.
        """
        settings, conditions, given = read_arguments(LayerSettings, self.settings, {
            "prompt": prompt, "layers": layers, "words": words, "at_steps": at_steps, "seed": seed, **fields,
        })  # fmt: skip
        settings = resolve(settings)
        print_warnings(settings, self.models.spec)
        check_watch(settings)
        models = self.models.steered(conditions, settings)
        steps, attention = watch(models, prompt, seed, settings, progress)
        [final] = models.decode(steps[-1].latent, settings.width, settings.height, settings.watermark)
        film = Film.of(models, prompt, steps, attention, final)
        return FilmResult(settings, film, dict(models.timings), given.unfiled)

    @cached_property
    def _checkpoint(self) -> str | None:
        """The fingerprint of the transformer, by which a scan of it is found."""
        return checkpoint_of(self.settings)

    def _read_sweep(
        self,
        cls: type[SweepSettings],
        prompts: str | Sequence[str | Mapping[str, Any]],
        layers: int | str | Sequence[int] | Sequence[Sequence[int]],
        seed: int,
        folder: AnyPath | None,
        fields: dict[str, Any],
    ) -> "tuple[SweepSettings, Path | TemporaryDirectory[str]]":
        """Return the settings of `skip` and `scan`, and their folder. Warn of settings without effect."""
        temporary = None
        if folder is None:
            temporary = TemporaryDirectory(prefix="flux-")
            folder = temporary.name
        arguments = {"prompts": prompts, "layers": layers, "seed": seed, **fields}
        settings = read_file_arguments(cls, self.settings, arguments, folder)
        print_warnings(settings, self.models.spec)
        return settings, temporary or Path(settings.output_dir)
