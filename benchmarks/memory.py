"""Measures FLUX.1-dev with random weights under caps on GPU memory: does each plan hold, at what cost?

    python -m benchmarks.memory [--output benchmarks/results/CARD-memory.json] [--caps 24,16,12,8]
                                [--only Q4_K,blocks] [--minutes 7]

Makes an image and an edit of 1024x1024 with each form of the transformer's weights, as loaded (bf16, 8-bit
floats and GGUF's blocks as files hold them) or packed while loading: everything on the GPU, and with the plan
that "auto" picks under each cap (GiB). Beside them it measures diffusers on the same weights: groups of one
block offloaded, and the same GGUF blocks. `--only` runs the cases whose names contain one of these texts.

Results are saved after each case. With the same --output it resumes. No case begins after so many minutes.
Needs a GPU, 100 GB of main memory, and no file. `--toy` runs the same on a tiny model, on any machine.
"""

import json
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    EDITS,
    GIB,
    GUIDANCE,
    PROMPT,
    PassClock,
    check_full_size,
    clean,
    machine,
    markdown,
    names_with,
    peak_gib,
    source_of,
    sources_of,
    toy_plan,
    words_of,
)
from benchmarks.diffusers_peer import peer_pipeline, to_diffusers_names
from benchmarks.gguf_linears import peer_linear
from benchmarks.random_weights import write_text_encoders
from flux.editing.edit import edit
from flux.errors import InputError, exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.modules import gguf_blocks
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.float8 import EIGHT_BIT_FLOATS
from flux.modules.linear import PackedLinear
from flux.runtime.devices import pick_device
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import Plan, free_memory
from flux.settings.command_line import run
from flux.settings.edits import EditSettings
from flux.settings.fields import LIST
from flux.specs import ModelSpec, configs
from flux.weights.load import on_meta

STEPS = 5
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_TOY = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
CLIP_TOY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDTH_TOY = {"hidden_size": 256, "axes_dim": [16, 56, 56]}  # of GGUF's largest blocks
# Where a block has its scales in half precision, and the scales that give random bytes a deviation of 1.
SCALES = {"Q8_0": {0: 1 / 74}, "Q4_K": {0: 1 / 260, 2: 7.5 / 260}}


@dataclass(frozen=True)
class Packed:
    """A matrix of random numbers as files pack it.

    Attributes:
        kind: The form of the numbers.
        rows: The packed rows, `rows bytes`.
        scale: The scale of all numbers. If None, the blocks have their own.
    """

    kind: str
    rows: Tensor
    scale: Tensor | None

    @classmethod
    def draw(cls, kind: str, shape: torch.Size, deviation: float, device: torch.device) -> "Packed":
        """Draws a matrix on the device, and keeps it in main memory."""
        if kind in EIGHT_BIT_FLOATS:
            rows = (64 * torch.randn(shape, device=device)).to(EIGHT_BIT_FLOATS[kind])
            return cls(kind, rows.view(torch.uint8).cpu(), torch.tensor(deviation / 64))
        numbers, size = gguf_blocks.BLOCKS[kind]
        rows = torch.randint(256, (shape[0], shape[1] // numbers, size), dtype=torch.uint8, device=device)
        for at, scale in SCALES[kind].items():
            half = torch.tensor([scale * deviation], dtype=torch.float16, device=device)
            rows[..., at : at + 2] = half.view(torch.uint8)
        return cls(kind, rows.flatten(1).cpu(), None)


class RandomModels:
    """Random weights of the four models in main memory, to build pipelines from."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, t5: dict, clip: dict):
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.spec, self.dtype = spec, dtype
        self.kinds = {
            "transformer": (Flux, spec.params),
            "vae": (AutoEncoder, spec.ae_params),
            "text_encoder_2": (T5EncoderModel, T5Config(**t5, feed_forward_proj="gated-gelu")),
            "text_encoder": (CLIPTextModel, CLIPTextConfig(**clip)),
        }
        torch.manual_seed(0)
        self.weights = {part: self._draw(on_meta(*kind), device) for part, kind in self.kinds.items()}
        self.made = {part: sources_of(weights) for part, weights in self.weights.items()}
        self.device, self.plain = device, self
        folder = Path(tempfile.mkdtemp())
        write_text_encoders(folder, spec, words_of([PROMPT, *EDITS]))
        self.tokenizers = {"text_encoder": folder / "tokenizer", "text_encoder_2": folder / "tokenizer_2"}

    def _draw(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Draws weights on the device, tensor by tensor, that keep activations of order one."""
        weights = {}
        for name, x in model.named_parameters():
            is_scale = name.endswith(".scale") or ("norm" in name and name.endswith(".weight"))
            if is_scale:
                weights[name] = torch.ones(x.shape, dtype=self.dtype)
                continue
            deviation = x[0].numel() ** -0.5 if x.ndim > 1 else 0.02
            weights[name] = torch.randn(x.shape, device=device, dtype=self.dtype).mul_(deviation).cpu()
        return weights

    def packed(self, kind: str) -> "RandomModels":
        """Packs the matrices of the transformer's blocks. All other weights are shared."""
        other = copy(self)
        other.weights, other.made = ({**part} for part in (self.weights, self.made))
        plain, sources = dict(self.weights["transformer"]), dict(self.made["transformer"])
        for name, x in plain.items():
            if x.ndim == 2 and "_blocks." in name:
                plain[name] = Packed.draw(kind, x.shape, x.shape[1] ** -0.5, self.device)
                sources[name] = source_of(kind, x.shape, plain[name].rows.nbytes)
        other.weights["transformer"], other.made["transformer"] = plain, sources
        return other

    def build(self, part: str) -> nn.Module:
        """Builds a model that shares these weights."""
        model = on_meta(*self.kinds[part])
        packed = {name: x for name, x in self.weights[part].items() if isinstance(x, Packed)}
        plain = {name: x for name, x in self.weights[part].items() if name not in packed}
        model.load_state_dict(plain, strict=False, assign=True)
        for name, x in packed.items():
            parent, _, own = name.removesuffix(".weight").rpartition(".")
            module = model.get_submodule(parent)
            bias = getattr(module, own).bias
            setattr(module, own, PackedLinear(x.rows, x.kind, bias, x.scale, self.dtype))
        if part == "text_encoder_2":
            model.encoder.embed_tokens = model.shared
        for name, buffer in list(model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            model.get_submodule(module).register_buffer(leaf, positions, persistent=False)
        return model.eval().requires_grad_(False)

    def pipeline(self, settings: EditSettings, plan: Plan, device: torch.device) -> LoadedModel:
        """Builds a pipeline and places it as planned."""
        lengths = {"text_encoder_2": self.spec.text_length, "text_encoder": self.spec.clip_length}
        t5, clip = (
            HFEmbedder.from_encoder(self.build(part), length, str(self.tokenizers[part]))
            for part, length in lengths.items()
        )
        model, ae = self.build("transformer"), self.build("vae")
        pipe = LoadedModel(self.spec, model, ae, t5, clip, device, self.dtype)
        pipe.place(settings, plan)
        return pipe


@dataclass(frozen=True)
class Case:
    """One way to hold the weights.

    Attributes:
        name: Its name in the results.
        offload: The setting "offload".
        file: The form of the matrices in the transformer's blocks as they are loaded.
        quantize: The setting "quantize".
        t5: The setting "t5".
        cap: The cap on GPU memory in GiB, for "auto".
    """

    name: str
    offload: str = "none"
    file: str = "BF16"
    quantize: str = "none"
    t5: str = "same"
    cap: float | None = None


FORMS = [
    Case("bf16"),
    Case("8 bits", quantize="8bit", t5="8bit"),
    Case("4 bits", quantize="4bit", t5="8bit"),
    Case("fp8 products", quantize="fp8"),
    Case("fp8 file", file="F8_E4M3", quantize="8bit"),
    Case("GGUF Q8_0", file="Q8_0"),
    Case("GGUF Q4_K", file="Q4_K"),
]


def cases_of(form: Case, caps: tuple[float, ...]) -> list[Case]:
    """Lists the cases of a form: on the GPU, offloaded if it is the plain one, and under each cap."""
    named = ("model", "blocks") if form.name == "bf16" else ()
    return [
        form,
        *(replace(form, name=f"{form.name}, {offload}", offload=offload) for offload in named),
        *(replace(form, name=f"{form.name}, {cap:g} GiB", offload="auto", cap=cap) for cap in caps),
    ]


def limit(device: torch.device, cap: float | None) -> None:
    """Limits this process to so many GiB of the GPU. If None, it may use all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)


def run_case(models: RandomModels, case: Case, settings: EditSettings, device: torch.device) -> dict:
    """Measures an image and an edit: planned and actual peaks, and milliseconds a step."""
    clean(device)
    limit(device, case.cap)
    settings = settings.model_copy(update={"offload": case.offload, "quantize": case.quantize, "t5": case.t5})
    on_gpu = device.type == "cuda"
    estimate = MemoryEstimator(settings, models.spec, models.made, models.dtype, models.dtype, on_gpu)
    if case.offload == "auto":
        free = free_memory(device)
        plan = Plan.of(estimate, "none") if free is None else Plan.fitting(estimate, free)
    else:
        counts = (
            len(model.blocks) * (case.offload == "blocks") for model in (estimate.transformer, estimate.t5)
        )
        plan = Plan.of(estimate, case.offload, *counts)
    begin = time.perf_counter()
    pipe = models.pipeline(settings, plan, device)
    found = {"place_s": time.perf_counter() - begin, "offload": plan.offload, "streamed": plan.streamed}
    found |= {"streamed_t5": plan.streamed_t5, "planned_gib": plan.peak / GIB}
    clean(device)
    sampling = {**settings.sampling(), "watermark": False, "progress": False}
    begin = time.perf_counter()
    with PassClock(pipe.model.final_layer, device) as clock:
        pipe.generate([PROMPT], [0], **sampling)
    found |= {"picture_ms": clock.step_ms(1)["median"], "picture_s": time.perf_counter() - begin}
    found["picture_gib"] = peak_gib(device)
    begin = time.perf_counter()
    with PassClock(pipe.model.final_layer, device) as clock:
        edit(pipe, settings, settings.vital_layers, progress=False)
    found |= {"edit_ms": clock.step_ms(2)["median"], "edit_s": time.perf_counter() - begin}
    found["peak_gib"] = peak_gib(device)
    return found


def offload_in_groups(transformer: nn.Module, _: RandomModels, device: torch.device) -> None:
    """Offloads blocks in groups of one, on a separate stream."""
    from diffusers.hooks import apply_group_offloading

    on_gpu = device.type == "cuda"
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        record_stream=on_gpu,
    )


def pack_as_gguf(transformer: nn.Module, models: RandomModels, device: torch.device) -> None:
    """Puts the packed matrices into diffusers' own layers, on the device."""
    packed = {name: x for name, x in models.weights["transformer"].items() if isinstance(x, Packed)}
    kind = next(iter(packed.values())).kind
    rows = {name: x.rows for name, x in packed.items()}
    for name, part in to_diffusers_names(rows, models.spec.params.hidden_size).items():
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        module = transformer.get_submodule(parent)
        old = getattr(module, own)
        layer = peer_linear(part, kind, old.in_features, models.dtype)
        layer.bias = old.bias
        setattr(module, own, layer)
    transformer.to(device)


def run_peer(
    models: RandomModels,
    place: Callable[[nn.Module, RandomModels, torch.device], None],
    settings: EditSettings,
    device: torch.device,
) -> dict:
    """Measures diffusers' pipeline on the same weights, placed by `place`. Texts are random features."""
    clean(device)
    limit(device, None)
    begin = time.perf_counter()
    peer = peer_pipeline(models.plain.build("transformer"), models.spec.ae_params, models.dtype)
    place(peer.transformer, models, device)
    peer.vae.to(device)
    found = {"place_s": time.perf_counter() - begin}
    params, spec = models.spec.params, models.spec
    texts = {
        "prompt_embeds": torch.randn(
            1, spec.text_length, params.context_in_dim, device=device, dtype=models.dtype
        ),
        "pooled_prompt_embeds": torch.randn(1, params.vec_in_dim, device=device, dtype=models.dtype),
    }
    clean(device)
    with torch.no_grad(), PassClock(peer.transformer.proj_out, device) as clock:
        peer(**texts, width=settings.width, height=settings.height, num_inference_steps=STEPS)
    return found | {"picture_ms": clock.step_ms(1)["median"], "peak_gib": peak_gib(device)}


def table(results: dict[str, dict]) -> str:
    """Formats the results."""
    columns = ["", "plan", "streamed", "planned GiB", "peak GiB", "ms a step", "ms an edit's step", "error"]
    keys = ("offload", "streamed", "planned_gib", "peak_gib", "picture_ms", "edit_ms", "error")
    rows = []
    for name, found in results.items():
        values = (found.get(key, "-") for key in keys)
        texts = (f"{x:.2f}" if isinstance(x, float) else str(x)[:60] for x in values)
        rows.append([name, *texts])
    return markdown(columns, rows)


def work_of(
    form: Case, caps: tuple[float, ...], settings: EditSettings, device: torch.device
) -> dict[str, Callable[[RandomModels], dict]]:
    """Names what is run with models of this form."""
    work = {
        case.name: partial(run_case, case=case, settings=settings, device=device)
        for case in cases_of(form, caps)
    }
    peer = partial(run_peer, settings=settings, device=device)
    if form.name == "bf16":
        work["diffusers, bf16 in groups of one block"] = partial(peer, place=offload_in_groups)
    if form.file in gguf_blocks.BLOCKS:
        work[f"diffusers, {form.name}"] = partial(peer, place=pack_as_gguf)
    return work


@exit_on_input_error()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    caps: Annotated[tuple[float, ...], LIST] = (24, 16, 12, 8),
    only: str = "",
    minutes: float = 7,
) -> None:
    """Runs the benchmark.

    Args:
        output: JSON file to write to, or to resume
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        caps: caps on GPU memory, in GiB
        only: run only cases whose names contain one of these texts, with commas between them
        minutes: no case begins after so many
    """
    begin, where = time.monotonic(), pick_device(device)
    check_full_size(where, toy)
    if toy:
        plan = toy_plan()
        spec = replace(plan.spec, params=replace(plan.spec.params, **WIDTH_TOY))
        dtype, sizes, side, layers = torch.float32, (T5_TOY, CLIP_TOY), 64, plan.layers
    else:
        spec = configs["flux-dev"]
        dtype, sizes, side, layers = torch.bfloat16, (T5_XXL, CLIP_L), 1024, spec.vital_layers
    settings = EditSettings(
        model="flux-dev", prompt=PROMPT, edits=EDITS[:1], vital_layers=layers, width=side, height=side,
        num_steps=STEPS, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
    )  # fmt: skip
    results: dict[str, Any] = {"machine": machine(where), "dtype": str(dtype), "cases": {}}
    if output and Path(output).is_file():
        results = json.loads(Path(output).read_text())
    plain = RandomModels(spec, where, dtype, *sizes)
    works = [(form, work_of(form, caps, settings, where)) for form in FORMS]
    wanted = names_with([name for _, work in works for name in work], only)
    for form, work in works:
        todo = [name for name in work if name not in results["cases"] and name in wanted]
        if not todo:
            continue
        models = plain if form.file == "BF16" else plain.packed(form.file)
        for name in todo:
            if time.monotonic() - begin > 60 * minutes:
                print(f"{minutes:g} minutes are over: {name} and what follows is left for the next run")
                break
            try:
                found = work[name](models)
            except (RuntimeError, InputError) as error:
                # A failure of one case does not stop the others.
                found = {"error": f"{type(error).__name__}: {error}"[:500]}
            results["cases"][name] = found
            print(f"{name}: {found}", flush=True)
            if output:
                write_json(output, results)
    print("\n" + table(results["cases"]))


if __name__ == "__main__":
    run(main, __doc__)
