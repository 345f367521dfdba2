"""FLUX.1-dev with random weights under caps on GPU memory: does each plan hold, and what does it cost?

    python -m benchmarks.memory [--output benchmarks/results/CARD-memory.json] [--caps 24,16,12,8]

Makes a picture and an edit of 1024x1024 with the plan that "auto" picks under each cap (GiB), then with every
way to hold the weights without a cap, and with diffusers' group offload. Needs a GPU, 100 GB of main memory,
and no file. `--toy` runs the same on a tiny model, on any machine.
"""

import gc
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import fire
import torch
from torch import Tensor, nn

from benchmarks.full_size import EDITS, GUIDANCE, PROMPT, toy_plan
from benchmarks.peer import peer_pipeline
from benchmarks.report import GIB, PassClock, machine, markdown
from benchmarks.stand_ins import write_text_encoders
from flux.checkpoint import Stored, Weight
from flux.editing import edit
from flux.errors import InputError, exit_on_input_error
from flux.images import write_json
from flux.layouts import Source
from flux.loading import on_meta
from flux.memory import Accounts, Plan, free_memory
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.pipeline import Pipeline, pick_device
from flux.settings import EditSettings
from flux.specs import ModelSpec, configs

STEPS = 5
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_TOY = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
CLIP_TOY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Nets:
    """The weights of the four nets in main memory, drawn at random, to build pipelines of."""

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
        self.made = {
            part: {name: self._source(x) for name, x in weights.items()}
            for part, weights in self.weights.items()
        }
        folder = Path(tempfile.mkdtemp())
        write_text_encoders(folder, spec, {word for text in (PROMPT, *EDITS) for word in text.split()})
        self.tokenizers = {"text_encoder": folder / "tokenizer", "text_encoder_2": folder / "tokenizer_2"}

    def _draw(self, net: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Matrices that keep activations of order one, tensor by tensor, drawn where that is fast."""
        weights = {}
        for name, x in net.named_parameters():
            is_scale = name.endswith(".scale") or ("norm" in name and name.endswith(".weight"))
            if is_scale:
                weights[name] = torch.ones(x.shape, dtype=self.dtype)
                continue
            deviation = x[0].numel() ** -0.5 if x.ndim > 1 else 0.02
            weights[name] = torch.randn(x.shape, device=device, dtype=self.dtype).mul_(deviation).cpu()
        return weights

    def _source(self, x: Tensor) -> Source:
        """As if a file held the tensor as it is."""
        return Source((Weight(Stored(Path("random"), "BF16", tuple(x.shape), 0, x.nbytes)),))

    def build(self, part: str) -> nn.Module:
        """A net around these weights, which it shares."""
        net = on_meta(*self.kinds[part])
        net.load_state_dict(self.weights[part], strict=False, assign=True)
        if part == "text_encoder_2":
            net.encoder.embed_tokens = net.shared
        for name, buffer in list(net.named_buffers()):
            module, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            net.get_submodule(module).register_buffer(leaf, positions, persistent=False)
        return net.eval().requires_grad_(False)

    def pipeline(self, settings: EditSettings, plan: Plan, device: torch.device) -> Pipeline:
        lengths = {"text_encoder_2": self.spec.text_length, "text_encoder": self.spec.clip_length}
        t5, clip = (
            HFEmbedder.around(self.build(part), length, str(self.tokenizers[part]))
            for part, length in lengths.items()
        )
        model, ae = self.build("transformer"), self.build("vae")
        return Pipeline.of(self.spec, model, ae, t5, clip, settings, plan, device, self.dtype)


@dataclass(frozen=True)
class Case:
    """One way to hold the weights. A cap in GiB goes with "auto"."""

    name: str
    offload: str
    quantize: str = "none"
    t5: str = "same"
    cap: float | None = None


WAYS = [
    Case("bf16", "none"),
    Case("8 bits", "none", "8bit", "8bit"),
    Case("4 bits", "none", "4bit", "8bit"),
    Case("bf16, model", "model"),
    Case("bf16, blocks", "blocks"),
    Case("4 bits, blocks", "blocks", "4bit"),
]


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def run_case(nets: Nets, case: Case, settings: EditSettings, device: torch.device) -> dict:
    """Peaks, planned and found, and milliseconds a step of a picture and of an edit."""
    clean(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(1.0, case.cap * GIB / total) if case.cap else 1.0
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    settings = settings.model_copy(update={"offload": case.offload, "quantize": case.quantize, "t5": case.t5})
    accounts = Accounts(settings, nets.spec, nets.made, nets.dtype, nets.dtype, device.type == "cuda")
    if case.offload == "auto":
        free = free_memory(device)
        plan = accounts.plan("none") if free is None else accounts.fitting(free)
    else:
        counts = (len(net.blocks) * (case.offload == "blocks") for net in (accounts.flow, accounts.t5))
        plan = accounts.plan(case.offload, *counts)
    begin = time.perf_counter()
    pipe = nets.pipeline(settings, plan, device)
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


def run_peer(nets: Nets, settings: EditSettings, device: torch.device) -> dict:
    """diffusers' transformer with its blocks offloaded in groups of one, on a stream of their own."""
    from diffusers.hooks import apply_group_offloading

    clean(device)
    begin = time.perf_counter()
    peer = peer_pipeline(nets.build("transformer"), nets.spec.ae_params, nets.dtype)
    on_gpu = device.type == "cuda"
    apply_group_offloading(
        peer.transformer,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        record_stream=on_gpu,
    )
    peer.vae.to(device)
    found = {"place_s": time.perf_counter() - begin}
    params, spec = nets.spec.params, nets.spec
    texts = {
        "prompt_embeds": torch.randn(
            1, spec.text_length, params.context_in_dim, device=device, dtype=nets.dtype
        ),
        "pooled_prompt_embeds": torch.randn(1, params.vec_in_dim, device=device, dtype=nets.dtype),
    }
    clean(device)
    with torch.no_grad(), PassClock(peer.transformer.proj_out, device) as clock:
        peer(**texts, width=settings.width, height=settings.height, num_inference_steps=STEPS)
    return found | {"picture_ms": clock.step_ms(1)["median"], "peak_gib": peak_gib(device)}


def table(results: dict[str, dict]) -> str:
    columns = ["", "plan", "streamed", "planned GiB", "peak GiB", "ms a step", "ms an edit's step", "error"]
    keys = ("offload", "streamed", "planned_gib", "peak_gib", "picture_ms", "edit_ms", "error")
    rows = []
    for name, found in results.items():
        values = (found.get(key, "-") for key in keys)
        texts = (f"{x:.2f}" if isinstance(x, float) else str(x)[:60] for x in values)
        rows.append([name, *texts])
    return markdown(columns, rows)


@exit_on_input_error()
def main(
    output: str | None = None, toy: bool = False, device: str = "auto", caps: tuple = (24, 16, 12, 8)
) -> None:
    where = pick_device(device)
    if toy:
        plan = toy_plan()
        nets = Nets(plan.spec, where, torch.float32, T5_TOY, CLIP_TOY)
        side, layers = 64, plan.layers
    else:
        spec = configs["flux-dev"]
        nets = Nets(spec, where, torch.bfloat16, T5_XXL, CLIP_L)
        side, layers = 1024, spec.vital_layers
    settings = EditSettings(
        model="flux-dev", prompt=PROMPT, edits=EDITS[:1], vital_layers=layers, width=side, height=side,
        num_steps=STEPS, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
    )  # fmt: skip
    results = {"machine": machine(where), "dtype": str(nets.dtype), "cases": {}}
    results["machine"]["versions"]["diffusers"] = metadata.version("diffusers")
    capped = [
        Case(f"auto, {cap:g} GiB", "auto", cap=cap) for cap in ([caps] if isinstance(caps, int) else caps)
    ]
    work = {case.name: lambda case=case: run_case(nets, case, settings, where) for case in (*capped, *WAYS)}
    work["diffusers, groups of one block"] = lambda: run_peer(nets, settings, where)
    for name, run in work.items():
        try:
            found = run()
        except (RuntimeError, InputError) as error:
            # What one of them cannot do does not stop the others.
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        results["cases"][name] = found
        print(f"{name}: {found}", flush=True)
        if output:
            write_json(output, results)
    print("\n" + table(results["cases"]))


if __name__ == "__main__":
    fire.Fire(main)
