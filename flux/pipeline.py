"""The four nets of a model held together: prompts in, pictures out."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from flux import sampling
from flux.errors import InputError
from flux.images import to_pil, to_tensor
from flux.loading import check_fit, find_files, load_clip, load_net, load_t5, on_meta
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.sampling import Conditioning, Step
from flux.settings import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.watermark import embed_watermark


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": the first of a CUDA GPU, an Apple GPU and the CPU that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Got device {name!r}, which is not here: give cpu, cuda, cuda:1, mps or auto"
        ) from error
    return device


def pick_dtype(name: str, device: torch.device, spec: ModelSpec) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16, but float32 for the package's small model on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" and spec.folder else torch.bfloat16
    return getattr(torch, name)


@dataclass
class Pipeline:
    """One model, loaded.

    Attributes:
        device: where the nets compute.
        offload: whether each net lies in host memory until its turn comes.
        timings: seconds spent so far, by what was done.
    """

    spec: ModelSpec
    model: Flux
    ae: AutoEncoder
    t5: HFEmbedder
    clip: HFEmbedder
    device: torch.device
    dtype: torch.dtype
    offload: bool = False
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: ModelSettings) -> "Pipeline":
        """Finds, downloads and loads what the settings name. Raises InputError before the first net is
        loaded.
        """
        spec = get_spec(settings.model)
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device, spec)
        files = find_files(settings.model, settings.weights, settings.ae_weights, settings.text_encoders)
        nets = ((Flux, spec.params, files.flow), (AutoEncoder, spec.ae_params, files.ae))
        for net_class, params, path in nets:
            check_fit(on_meta(net_class, params), path)
        home = torch.device("cpu") if settings.offload else device
        # T5 overflows in float16.
        text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype

        begin = time.perf_counter()
        t5 = load_t5(home, spec.text_length, settings.model, files.text, text_dtype)
        clip = load_clip(home, settings.model, files.text, text_dtype)
        model, ae = (load_net(*net, home, dtype) for net in nets)
        if settings.compile:
            model.compile_blocks()
        timings = {"load": time.perf_counter() - begin}
        return cls(spec, model, ae, t5, clip, device, dtype, settings.offload, timings)

    @contextmanager
    def _at_work(self, what: str, *nets: nn.Module) -> Iterator[None]:
        """These nets are on the device, without gradients; the time it takes is added to `timings`."""
        begin = time.perf_counter()
        if self.offload:
            for net in nets:
                net.to(self.device)
        try:
            with torch.inference_mode():
                yield
        finally:
            if self.offload:
                for net in nets:
                    net.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - begin

    def condition(
        self, prompts: Sequence[str], guidance: float, true_cfg: float = 1.0, negative_prompt: str = ""
    ) -> Conditioning:
        """What steers a batch of these prompts. A `true_cfg` above 1 adds the pass of the negative prompt."""
        with self._at_work("text", self.t5, self.clip):
            wanted = [*prompts, negative_prompt] if true_cfg > 1 else list(prompts)
            # Each text once, however often it is asked for: same text, same features to the last bit.
            unique = list(dict.fromkeys(wanted))
            rows = [unique.index(text) for text in wanted]
            txt, vec = (encoder(unique).to(self.device, self.dtype)[rows] for encoder in (self.t5, self.clip))
        batch = len(prompts)
        txt_ids = torch.zeros(batch, txt.shape[1], 3, device=self.device)
        scale = torch.full((batch,), guidance, device=self.device, dtype=self.dtype)
        negative = None
        if true_cfg > 1:
            alike = (txt[-1:].expand(batch, -1, -1), txt_ids, vec[-1:].expand(batch, -1))
            negative = Conditioning(*alike, scale)
        return Conditioning(txt[:batch], txt_ids, vec[:batch], scale, negative, true_cfg)

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
            yield self.model

    def image_ids(self, batch: int, width: int, height: int) -> Tensor:
        return sampling.image_ids(batch, height, width, self.device)

    def decode(self, latents: Tensor, width: int, height: int, watermark: bool = False) -> list[Image.Image]:
        """Packed latents "B I 64" -> pictures, one at a time so that memory stays that of one."""
        with self._at_work("decode", self.ae):
            unpacked = sampling.unpack(latents, height, width).to(self.dtype)
            pictures = torch.cat(
                [self.ae.decode(latent).float().clamp(-1, 1) for latent in unpacked.split(1)]
            )
        return [to_pil(picture) for picture in (embed_watermark(pictures) if watermark else pictures)]

    def encode(self, image: Image.Image) -> Tensor:
        """A picture whose sides are multiples of 16 -> its packed latent, "1 I 64"."""
        with self._at_work("encode", self.ae):
            return sampling.pack(self.ae.encode(to_tensor(image)[None].to(self.device, self.dtype)))

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
        on_step: Callable[[Step], None] | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """One picture for each prompt and seed, made as one batch.

        Args:
            width, height: in pixels, multiples of 16.
            image: start from this picture (of that size) instead of from noise alone: image-to-image.
            strength: how much of the schedule is then run, 0..1; 1 keeps nothing of it.
            on_step: called with each step as soon as it is taken.
        """
        cond = self.condition(prompts, guidance, true_cfg, negative_prompt)
        latent, levels = self.noise(seeds, width, height), self.schedule(num_steps, width, height)
        if image is not None:
            levels = levels[round((1 - strength) * num_steps) :]
            latent = levels[0] * latent + (1 - levels[0]) * self.encode(image)
        ids = self.image_ids(len(prompts), width, height)
        with self.denoising() as model:
            steps = sampling.sample(model, latent, ids, cond, levels)
            for step in tqdm(steps, total=len(levels) - 1, desc="denoise", unit="step", disable=not progress):
                latent = step.latent
                if on_step:
                    on_step(step)
        return self.decode(latent, width, height, watermark)
