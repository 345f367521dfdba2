"""A model loaded: prompts in, images out."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import sampling
from flux.conditions.images import UNSTEERED, ConditionImages, Steering, encode_conditions
from flux.errors import InputError
from flux.images.io import to_pil, to_tensor
from flux.images.watermark import embed_watermark
from flux.intervention import NOTHING, Intervention
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.step_cache import StepCache
from flux.runtime.condition_encoders import image_encoders
from flux.runtime.devices import check_compiler, pick_device, pick_dtype
from flux.runtime.graphs import GraphedModel
from flux.runtime.offload import Offloaded
from flux.runtime.parallel import ALONE, ProcessGroup, SequenceParallelFlux
from flux.runtime.plan import Plan, check_size, make_plan, warn_of_slow_steps
from flux.runtime.quantize import BITS, check_fp8_support, quantize_linears, to_fp8
from flux.runtime.tiling import in_tiles
from flux.sampling import Conditioning, Step, VelocityModel
from flux.sampling.reporting import ReportingModel
from flux.settings.demos import ModelSettings
from flux.settings.resolved import SteeredSettings
from flux.specs import ModelSpec, configs, get_spec
from flux.vocabulary import warn_of_unknown_words
from flux.weights.find import find_model
from flux.weights.open_model import OpenModel


@dataclass(repr=False)
class LoadedModel:
    """One model, loaded: its networks, and the stages between a prompt and an image.

    `flux.Pipeline` holds one, and gives its calls the model's own size, steps and guidance.

    Attributes:
        spec: The model.
        model: Its transformer.
        ae: Its autoencoder.
        t5: Its T5 encoder, for the text tokens.
        clip: Its CLIP encoder, for the pooled text vector.
        device: Where the models compute.
        dtype: What the transformer and the autoencoder compute in.
        tiled: Whether images are decoded and encoded in tiles.
        offloaded: The models that wait in main memory until they are used.
        group: The processes that share each image's tokens.
        graphed: The transformer with its passes recorded. If None, none are, see `record_passes`.
        timings: Seconds spent so far, by stage.
        steering: The images that steer all passes, see `steered`.
    """

    spec: ModelSpec
    model: Flux
    ae: AutoEncoder
    t5: HFEmbedder
    clip: HFEmbedder
    device: torch.device
    dtype: torch.dtype
    tiled: bool = False
    offloaded: dict[nn.Module, Offloaded] = field(default_factory=dict)
    group: ProcessGroup = ALONE
    graphed: GraphedModel | None = None
    timings: dict[str, float] = field(default_factory=dict)
    steering: Steering = UNSTEERED
    _listeners: list[Callable[[int], None]] = field(default_factory=list)

    def __repr__(self) -> str:
        name = next((name for name, spec in configs.items() if spec == self.spec), "of a spec of its own")
        return f"<LoadedModel {name}, {self.device}, {str(self.dtype).removeprefix('torch.')}>"

    @classmethod
    def load(
        cls, settings: ModelSettings | str, group: ProcessGroup = ALONE, opened: OpenModel | None = None
    ) -> "LoadedModel":
        """Find, download, check and load what the settings name.

        Args:
            settings: The model and how it runs, or only the model's name.
            group: The processes that share each image, see `flux.runtime.parallel.join`.
            opened: The model's files, if they are open already, see `flux.weights.find.local_model`.

        Raises:
            InputError: Something does not fit. It is raised before the first model is loaded.
        """
        if isinstance(settings, str):
            settings = ModelSettings(model=settings)
        spec = get_spec(settings.model)
        device = group.device or pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device, spec)
        if settings.quantize == "fp8":
            check_fp8_support(device, dtype)
        if settings.compile:
            check_compiler(device)
        check_size(settings, spec, dtype, device, group.count)
        opened = opened or find_model(settings)
        opened.check()
        warn_of_slow_steps(settings, spec, dtype, device)
        # T5 overflows in float16.
        text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        plan = make_plan(settings, opened, dtype, text_dtype, device)

        begin = time.perf_counter()
        cpu = torch.device("cpu")
        home = device if plan.offload == "none" else cpu
        # What `place` quantises is moved to the device matrix by matrix.
        transformer_home = home if settings.quantize == "none" else cpu
        t5_home = home if settings.t5 == "same" else cpu
        t5 = opened.load_text_encoder("text_encoder_2", t5_home, text_dtype, settings.t5 == "8bit")
        clip = opened.load_text_encoder("text_encoder", home, text_dtype)
        model = opened.load_transformer(transformer_home, dtype, BITS[settings.quantize] == 8)
        ae = opened.load_autoencoder(home, dtype)
        pipe = cls(spec, model, ae, t5, clip, device, dtype, group=group)
        pipe.place(settings, plan)
        pipe.timings["load"] = time.perf_counter() - begin
        return pipe

    def place(self, settings: ModelSettings, plan: Plan) -> None:
        """Quantise, move and compile the loaded models as the settings and the plan say. Called once."""
        device, home = self.device, self.device if plan.offload == "none" else torch.device("cpu")
        blocks = [self.model.double_blocks, self.model.single_blocks]
        t5_blocks = [cast(nn.ModuleList, self.t5.hf_module.get_submodule("encoder.block"))]
        if settings.quantize == "fp8":
            to_fp8(blocks, device, home)
        elif settings.quantize != "none":
            quantize_linears(blocks, BITS[settings.quantize], device, home)
        if settings.t5 == "8bit":
            quantize_linears(t5_blocks, 8, device, home)
        for module in (self.model, self.ae, self.clip, *[self.t5] * (settings.t5 != "cpu")):
            module.to(home)
        if settings.compile:
            self.model.compile_blocks(device)
            if device.type == "cuda" and plan.offload == "none":
                self.record_passes()
        self.tiled = plan.tiled
        if plan.offload != "none":
            self.offloaded = {module: Offloaded(module, device) for module in (self.clip, self.ae)}
            self.offloaded[self.model] = Offloaded(self.model, device, blocks, plan.streamed)
            if settings.t5 != "cpu":
                self.offloaded[self.t5] = Offloaded(self.t5, device, t5_blocks, plan.streamed_t5)

    def record_passes(self) -> None:
        """Launch passes of few tokens as CUDA graphs from now on, see `flux.runtime.graphs`."""
        self.graphed = GraphedModel(self.model)

    @contextmanager
    def _using(self, stage: str, *modules: nn.Module) -> Iterator[None]:
        """Hold these models on the device, without gradients, and add the time to `timings`."""
        begin = time.perf_counter()
        with torch.inference_mode(), ExitStack() as stack:
            for module in modules:
                if module in self.offloaded:
                    stack.enter_context(self.offloaded[module].on_device())
            yield
        if self.device.type == "cuda":
            # Not the whole device: another thread may compute on a stream of its own.
            torch.cuda.current_stream(self.device).synchronize()
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - begin

    def condition(
        self,
        prompts: Sequence[str],
        guidance: float | Sequence[float],
        true_cfg: float = 1.0,
        negative_prompt: str = "",
        mimic_scale: float | None = None,
        mimic_percentile: float = 0.995,
    ) -> Conditioning:
        """Encode prompts and join them with the guidance.

        Args:
            prompts: One prompt for each row of the batch.
            guidance: Distilled guidance, one for all rows or one for each.
            true_cfg: Scale of true CFG. Above 1 there is a second pass, with the negative prompt.
            negative_prompt: What the second pass is conditioned on.
            mimic_scale: See `flux.sampling.guided`.
            mimic_percentile: See `flux.sampling.guided`.
        """
        if self.spec.vocabulary:
            warn_of_unknown_words(prompts, self.spec.vocabulary)
        txt, vec = self._encode_texts([*prompts, negative_prompt] if true_cfg > 1 else prompts)
        batch = len(prompts)
        txt_ids = torch.zeros(batch, txt.shape[1], 3, device=self.device)
        scale = torch.tensor(guidance, device=self.device, dtype=self.dtype).expand(batch)
        negative = None
        if true_cfg > 1:
            negative = Conditioning(
                txt[-1:].expand(batch, -1, -1), txt_ids, vec[-1:].expand(batch, -1), scale
            )
        cond = Conditioning(
            txt[:batch], txt_ids, vec[:batch], scale, negative, true_cfg, mimic_scale, mimic_percentile
        )
        return cond.with_condition(self.steering.condition, self.steering.context_every)

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts to T5 features, "B T features", and pooled CLIP features, "B features".

        Each text is encoded once, so that equal texts have features that are equal bit for bit.
        """
        unique = list(dict.fromkeys(texts))
        rows = [unique.index(text) for text in texts]
        with self._using("text", self.t5, self.clip):
            txt, vec = (encoder(unique).to(self.device, self.dtype)[rows] for encoder in (self.t5, self.clip))
        return txt, vec

    def steered(self, images: ConditionImages, settings: SteeredSettings) -> "LoadedModel":
        """Return the same loaded models, whose passes these images steer from now on.

        Args:
            images: The images, see `flux.conditions.images.read_conditions`.
            settings: How they steer.

        Raises:
            InputError: As `encode_conditions`.
        """
        if not images:
            return self if self.steering is UNSTEERED else replace(self, steering=UNSTEERED)
        encoders = image_encoders(self.spec, settings, self.encode_pixels, self.device, self.dtype)
        with self._using("condition"):
            steering = encode_conditions(images, settings, encoders)
            like = torch.empty(0, device=self.device, dtype=self.dtype)
            return replace(self, steering=replace(steering, condition=steering.condition.to(like)))

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """Draw packed start noise for images of that size in pixels, one row for each seed, "B I 64"."""
        draws = [sampling.get_noise(1, height, width, self.device, self.dtype, seed) for seed in seeds]
        return sampling.pack(torch.cat(draws))

    def schedule(self, num_steps: int, width: int, height: int) -> list[float]:
        """The model's num_steps + 1 noise levels for images of that size in pixels.

        Raises:
            InputError: There is no step.
        """
        if num_steps < 1:
            raise InputError(f"Got {num_steps} steps, expected at least 1")
        tokens = (height // 16) * (width // 16)
        spec = self.spec
        return sampling.get_schedule(num_steps, tokens, spec.base_shift, spec.max_shift, spec.shifted)

    @contextmanager
    def denoising(self) -> Iterator[VelocityModel]:
        """Hold the transformer on the device for the duration of the block."""
        with self._using("denoise", self.model):
            graphed = self.graphed if self.graphed and self.graphed.model is self.model else None
            if graphed:
                graphed.begin()
            model: VelocityModel = graphed or self.model
            if self.group.count > 1:
                model = SequenceParallelFlux(self.model, self.group, graphed)
            yield ReportingModel(model, tuple(self._listeners)) if self._listeners else model

    @contextmanager
    def listening(self, on_pass: Callable[[int], None]) -> Iterator[None]:
        """Call `on_pass` with the number of rows after each pass through the transformer.

        It holds for every `denoising` that begins within the block.
        """
        self._listeners.append(on_pass)
        try:
            yield
        finally:
            self._listeners.remove(on_pass)

    def image_ids(self, batch: int, width: int, height: int) -> Tensor:
        """Positions of the tokens of images of that size in pixels, "B I 3"."""
        return sampling.image_ids(batch, height, width, self.device)

    def decode(self, latents: Tensor, width: int, height: int, watermark: bool = False) -> list[Image.Image]:
        """Decode packed latents, "B I 64", one by one, so that memory is that of one image.

        Args:
            latents: The latents of images of one size.
            width: Width of the images in pixels.
            height: Height of the images in pixels.
            watermark: Whether to embed the invisible watermark.
        """
        with self._using("decode", self.ae):
            unpacked = sampling.unpack(latents, height, width).to(self.dtype)
            decoded = (self._in_tiles(self.ae.decode, latent, 8) for latent in unpacked.split(1))
            images = torch.cat([image.float().clamp(-1, 1) for image in decoded])
        made = [to_pil(image) for image in (embed_watermark(images) if watermark else images)]
        return [self.steering.finish(image) for image in made]

    def encode(self, image: Image.Image) -> Tensor:
        """Encode an image whose sides are multiples of 16 to its packed latent, "1 I 64"."""
        return self.encode_pixels(to_tensor(image)[None])

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pixels in -1..1, "1 3 H W", with sides that are multiples of 16, to a latent, "1 I 64"."""
        with self._using("encode", self.ae):
            pixels = pixels.to(self.device, self.dtype)
            return sampling.pack(self._in_tiles(self.ae.encode, pixels, 1 / 8))

    def _in_tiles(self, convert: Callable[[Tensor], Tensor], x: Tensor, ratio: float) -> Tensor:
        return in_tiles(convert, x, ratio) if self.tiled else convert(x)

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        *,
        width: int,
        height: int,
        num_steps: int,
        guidance: float,
        true_cfg: float = 1.0,
        negative_prompt: str = "",
        mimic_scale: float | None = None,
        mimic_percentile: float = 0.995,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 1.0,
        watermark: bool = False,
        cache: float | None = None,
        intervention: Intervention = NOTHING,
        on_step: Callable[[Step], None] | None = None,
        progress: bool | str = True,
    ) -> list[Image.Image]:
        """Generate one image for each prompt and seed, as one batch.

        Args:
            prompts: The prompts. A text is one prompt.
            seeds: The seed of each prompt.
            width: Width of the images in pixels, a multiple of 16.
            height: Height of the images in pixels, a multiple of 16.
            num_steps: Number of steps of the whole schedule.
            guidance: See `condition`, like the next four.
            true_cfg: See `condition`.
            negative_prompt: See `condition`.
            mimic_scale: See `condition`.
            mimic_percentile: See `condition`.
            image: Start from this image, or from one for each prompt, instead of from noise alone (SDEdit,
                arXiv 2108.01073). It has the size of the images to generate.
            strength: Fraction of the schedule that is run on it, 0..1; 1 keeps nothing of it.
            watermark: Whether to embed the invisible watermark.
            cache: Threshold of `flux.modules.step_cache.StepCache`. If None, every step is computed in full.
            intervention: The changes to each pass.
            on_step: Called with each step as soon as it is taken.
            progress: Whether to show a progress bar, or what to write before it.

        Raises:
            InputError: There is no step, or not one seed for each prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds = [seeds] if isinstance(seeds, int) else seeds
        if len(prompts) != len(seeds):
            raise InputError(f"Got {len(prompts)} prompts and {len(seeds)} seeds, expected a seed for each")
        cond = self.condition(prompts, guidance, true_cfg, negative_prompt, mimic_scale, mimic_percentile)
        latent, levels = self.noise(seeds, width, height), self.schedule(num_steps, width, height)
        if image is not None:
            images = [image] if isinstance(image, Image.Image) else image
            levels = levels[round((1 - strength) * num_steps) :]
            latent = levels[0] * latent + (1 - levels[0]) * torch.cat([self.encode(each) for each in images])
        ids = self.image_ids(len(prompts), width, height)
        with self.denoising() as model:
            step_cache = StepCache(cache, self.group.total) if cache else None
            steps = sampling.sample(model, latent, ids, cond, levels, intervention, cache=step_cache)
            name = progress if isinstance(progress, str) else "denoise"
            for step in tqdm(steps, total=len(levels) - 1, desc=name, unit="step", disable=not progress):
                latent = step.latent
                if on_step:
                    on_step(step)
        return self.decode(latent, width, height, watermark)


@contextmanager
def count_evaluations(pipe: LoadedModel) -> Iterator[Callable[[], int]]:
    """Count the evaluations of the transformer, one for each image of each pass.

    A second pass for true CFG or of a second-order method counts too.

    Yields:
        A function that returns the count since the block began.
    """
    rows: list[int] = []
    with pipe.listening(rows.append):
        yield lambda: sum(rows)
