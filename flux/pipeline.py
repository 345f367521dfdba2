"""The four nets of a model held together: prompts in, pictures out."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import sampling
from flux.images.io import to_pil, to_tensor
from flux.images.watermark import embed_watermark
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.step_cache import StepCache
from flux.runtime.devices import pick_device, pick_dtype
from flux.runtime.offload import Offloaded
from flux.runtime.parallel import ALONE, Divided, Ranks
from flux.runtime.plan import Plan, make_plan
from flux.runtime.quantize import BITS, check_fp8_support, quantize_linears, to_fp8
from flux.runtime.tiling import in_tiles
from flux.sampling import Conditioning, Step
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.vocabulary import warn_of_unknown_words
from flux.weights.find import find_model
from flux.weights.open_model import OpenModel


@dataclass
class Pipeline:
    """One model, loaded.

    Attributes:
        device: where the nets compute.
        tiled: whether pictures are decoded and encoded in tiles.
        offloaded: the nets that lie in host memory until their turn comes.
        ranks: the processes that share out each picture's tokens.
        timings: seconds spent so far, by what was done.
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
    ranks: Ranks = ALONE
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls, settings: ModelSettings, ranks: Ranks = ALONE, opened: OpenModel | None = None
    ) -> "Pipeline":
        """Find, download, check and load what the settings name.

        Args:
            settings: The model and how it runs.
            ranks: The processes that share each image, see `flux.runtime.parallel.join`.
            opened: The model's files, if they are open already, see `flux.weights.find.local_model`.

        Raises:
            InputError: Something does not fit. It is raised before the first model is loaded.
        """
        spec = get_spec(settings.model)
        device = ranks.device or pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device, spec)
        if settings.quantize == "fp8":
            check_fp8_support(device, dtype)
        opened = opened or find_model(settings)
        opened.check()
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
        pipe = cls(spec, model, ae, t5, clip, device, dtype, ranks=ranks)
        pipe.place(settings, plan)
        pipe.timings["load"] = time.perf_counter() - begin
        return pipe

    def place(self, settings: ModelSettings, plan: Plan) -> None:
        """Quantise, move and compile the loaded models as the settings and the plan say. Called once."""
        device, home = self.device, self.device if plan.offload == "none" else torch.device("cpu")
        blocks, t5_blocks = [self.model.double_blocks, self.model.single_blocks], [self.t5.hf_module.encoder.block]
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
        self.tiled = plan.tiled
        if plan.offload != "none":
            self.offloaded = {module: Offloaded(module, device) for module in (self.clip, self.ae)}
            self.offloaded[self.model] = Offloaded(self.model, device, blocks, plan.streamed)
            if settings.t5 != "cpu":
                self.offloaded[self.t5] = Offloaded(self.t5, device, t5_blocks, plan.streamed_t5)

    @contextmanager
    def _at_work(self, what: str, *nets: nn.Module) -> Iterator[None]:
        """These nets are on the device, without gradients; the time it takes is added to `timings`."""
        begin = time.perf_counter()
        with torch.inference_mode(), ExitStack() as stack:
            for net in nets:
                if net in self.offloaded:
                    stack.enter_context(self.offloaded[net].on_device())
            yield
        if self.device.type == "cuda":
            # Not the whole device: another thread may be at work on a stream of its own.
            torch.cuda.current_stream(self.device).synchronize()
        self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - begin

    def condition(
        self,
        prompts: Sequence[str],
        guidance: float | Sequence[float],
        true_cfg: float = 1.0,
        negative_prompt: str = "",
        mimic_scale: float | None = None,
        mimic_percentile: float = 0.995,
    ) -> Conditioning:
        """What steers a batch of these prompts, with one guidance for all or one for each. A `true_cfg` above
        1 adds the pass of the negative prompt, and `mimic_scale` what `flux.sampling.guided` makes of it.
        """
        if self.spec.vocabulary:
            warn_of_unknown_words(prompts, self.spec.vocabulary)
        with self._at_work("text", self.t5, self.clip):
            wanted = [*prompts, negative_prompt] if true_cfg > 1 else list(prompts)
            # Each text once, however often it is asked for: same text, same features to the last bit.
            unique = list(dict.fromkeys(wanted))
            rows = [unique.index(text) for text in wanted]
            txt, vec = (encoder(unique).to(self.device, self.dtype)[rows] for encoder in (self.t5, self.clip))
        batch = len(prompts)
        txt_ids = torch.zeros(batch, txt.shape[1], 3, device=self.device)
        scale = torch.tensor(guidance, device=self.device, dtype=self.dtype).expand(batch)
        negative = None
        if true_cfg > 1:
            alike = (txt[-1:].expand(batch, -1, -1), txt_ids, vec[-1:].expand(batch, -1))
            negative = Conditioning(*alike, scale)
        guided = (negative, true_cfg, mimic_scale, mimic_percentile)
        return Conditioning(txt[:batch], txt_ids, vec[:batch], scale, *guided)

    def noise(self, seeds: Sequence[int], width: int, height: int) -> Tensor:
        """Packed start noise, one row for each seed, "B I 64"."""
        draws = [sampling.get_noise(1, height, width, self.device, self.dtype, seed) for seed in seeds]
        return sampling.pack(torch.cat(draws))

    def schedule(self, num_steps: int, width: int, height: int) -> list[float]:
        """The model's num_steps + 1 noise levels for pictures of that size."""
        tokens = (height // 16) * (width // 16)
        spec = self.spec
        return sampling.get_schedule(num_steps, tokens, spec.base_shift, spec.max_shift, spec.shifted)

    @contextmanager
    def denoising(self) -> Iterator[Flux]:
        """The transformer, ready on the device, for as long as the block lasts."""
        with self._at_work("denoise", self.model):
            yield Divided(self.model, self.ranks) if self.ranks.count > 1 else self.model

    def image_ids(self, batch: int, width: int, height: int) -> Tensor:
        return sampling.image_ids(batch, height, width, self.device)

    def decode(self, latents: Tensor, width: int, height: int, watermark: bool = False) -> list[Image.Image]:
        """Packed latents "B I 64" -> pictures, one at a time so that memory stays that of one."""
        with self._at_work("decode", self.ae):
            unpacked = sampling.unpack(latents, height, width).to(self.dtype)
            decoded = (self._in_tiles(self.ae.decode, latent, 8) for latent in unpacked.split(1))
            pictures = torch.cat([picture.float().clamp(-1, 1) for picture in decoded])
        return [to_pil(picture) for picture in (embed_watermark(pictures) if watermark else pictures)]

    def encode(self, image: Image.Image) -> Tensor:
        """A picture whose sides are multiples of 16 -> its packed latent, "1 I 64"."""
        with self._at_work("encode", self.ae):
            picture = to_tensor(image)[None].to(self.device, self.dtype)
            return sampling.pack(self._in_tiles(self.ae.encode, picture, 1 / 8))

    def _in_tiles(self, net: Callable[[Tensor], Tensor], x: Tensor, ratio: float) -> Tensor:
        return in_tiles(net, x, ratio) if self.tiled else net(x)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        width: int,
        height: int,
        num_steps: int,
        guidance: float,
        true_cfg: float = 1.0,
        negative_prompt: str = "",
        image: Image.Image | None = None,
        strength: float = 1.0,
        watermark: bool = False,
        cache: float | None = None,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """One picture for each prompt and seed, made as one batch.

        Args:
            width, height: in pixels, multiples of 16.
            image: start from this picture (of that size) instead of from noise alone: image-to-image.
            strength: how much of the schedule is then run, 0..1; 1 keeps nothing of it.
            cache: threshold of `flux.modules.step_cache.StepCache`; None: every step is computed whole.
            on_step: called with each step as soon as it is taken.
        """
        cond = self.condition(prompts, guidance, true_cfg, negative_prompt)
        latent, levels = self.noise(seeds, width, height), self.schedule(num_steps, width, height)
        if image is not None:
            levels = levels[round((1 - strength) * num_steps) :]
            latent = levels[0] * latent + (1 - levels[0]) * self.encode(image)
        ids = self.image_ids(len(prompts), width, height)
        with self.denoising() as model:
            spared = StepCache(cache, self.ranks.total) if cache else None
            steps = sampling.sample(model, latent, ids, cond, levels, cache=spared)
            for step in tqdm(steps, total=len(levels) - 1, desc="denoise", unit="step", disable=not progress):
                latent = step.latent
                if on_step:
                    on_step(step)
        return self.decode(latent, width, height, watermark)


@contextmanager
def counted(pipe: Pipeline) -> Iterator[Callable[[], int]]:
    """Gives how many pictures the transformer has been asked about since the block began: what a step costs,
    a second pass for true guidance or a second-order method included.
    """
    rows = []
    # The one part that every evaluation runs through whole, whatever is bypassed, compiled or offloaded.
    handle = pipe.model.final_layer.register_forward_hook(lambda net, given, out: rows.append(len(out)))
    try:
        yield lambda: sum(rows)
    finally:
        handle.remove()
