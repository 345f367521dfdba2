"""Measures whole images of FLUX.1-dev, from the text to the pixels, with random weights, beside diffusers.

    python -m benchmarks.whole_images [--gpus 2] [--output output/benchmarks/whole_images.json]

28 steps of 1024x1024, with T5-XXL, CLIP-L and the autoencoder at their full sizes. Ours runs as with the
setting `compile`, in bfloat16 and with 8-bit floats; diffusers in bfloat16, with compiled blocks. One image
warms each of them up, then they are interleaved; medians in seconds. With several GPUs it starts itself
through torchrun: they share each of our images, and diffusers uses the first one. Needs 60 GB on each GPU and
no network, and takes about four minutes. `--toy --device cpu` runs the same on tiny models.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import EDITS, GUIDANCE, PROMPT, machine, markdown, start_processes, toy_plan, words_of
from benchmarks.diffusers_models import diffusers_pipeline
from benchmarks.random_weights import random_transformer, write_text_encoders
from flux.errors import exit_on_input_error, launched, only_rank_zero_prints
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.runtime.devices import pick_device
from flux.runtime.parallel import ALONE, ProcessGroup, join
from flux.runtime.quantize import to_fp8
from flux.settings.command_line import run
from flux.specs import ModelSpec, configs

STEPS, SIDE = 28, 1024


def text_encoders(spec: ModelSpec, device: torch.device, toy: bool) -> tuple[HFEmbedder, HFEmbedder]:
    """Make T5-XXL and CLIP-L of random weights; with `toy`, one small layer of each."""
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5_sizes: dict[str, Any] = {"d_model": spec.params.context_in_dim, "feed_forward_proj": "gated-gelu"}
    clip_sizes: dict[str, Any] = {
        "hidden_size": spec.params.vec_in_dim,
        "max_position_embeddings": spec.clip_length,
    }
    if toy:
        t5_sizes |= {"d_ff": 64, "num_layers": 1, "num_heads": 2}
        clip_sizes |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    else:
        t5_sizes |= {"d_ff": 10240, "num_layers": 24, "num_heads": 64}
        clip_sizes |= {"intermediate_size": 3072, "num_attention_heads": 12}
    dtype = torch.float32 if toy else torch.bfloat16
    with torch.device(device):
        encoders: list[Any] = [
            T5EncoderModel(T5Config(**t5_sizes)),
            CLIPTextModel(CLIPTextConfig(**clip_sizes)),
        ]
    with TemporaryDirectory() as folder:
        write_text_encoders(Path(folder), spec, words_of([PROMPT, *EDITS]))
        names = ("tokenizer_2", "tokenizer")
        tokenizers = [AutoTokenizer.from_pretrained(f"{folder}/{name}") for name in names]
    encoders = [encoder.to(dtype).eval().requires_grad_(False) for encoder in encoders]
    lengths = spec.text_length, spec.clip_length
    t5, clip = (HFEmbedder.from_encoder(*each) for each in zip(encoders, lengths, tokenizers))
    return t5, clip


def pipelines(
    spec: ModelSpec, device: torch.device, group: ProcessGroup, toy: bool, compiled: bool
) -> dict[str, LoadedModel]:
    """Make our pipelines, which share their text encoders and autoencoder."""
    torch.manual_seed(0)
    dtype = torch.float32 if toy else torch.bfloat16
    weights = {n: x.to(device, dtype) for n, x in random_transformer(spec.params, device).items()}
    with torch.device(device):
        ae = AutoEncoder(spec.ae_params).to(dtype).eval().requires_grad_(False)
    t5, clip = text_encoders(spec, device, toy)

    def build(fp8: bool) -> Flux:
        with torch.device("meta"):
            model = Flux(spec.params)
        model.load_state_dict(weights, assign=True)
        model.eval().requires_grad_(False)
        if fp8:
            to_fp8([model.double_blocks, model.single_blocks])
        if compiled:
            model.compile_blocks(device)
        return model

    names = {"ours, bf16": False} if toy else {"ours, bf16": False, "ours, fp8": True}
    ours = {
        name: LoadedModel(spec, build(fp8), ae, t5, clip, device, dtype, group=group)
        for name, fp8 in names.items()
    }
    if compiled and device.type == "cuda":
        plain = replace(ours["ours, bf16"], timings={})
        for pipe in ours.values():
            pipe.record_passes()
        ours["ours, bf16, no CUDA graph"] = plain
    return ours


def peer_image(pipe: LoadedModel, steps: int, side: int, compiled: bool) -> Callable[[], object]:
    """Make diffusers' image, with the same text encoders and transformer."""
    with torch.device("meta"):
        bare = Flux(pipe.spec.params)
    bare.load_state_dict(pipe.model.state_dict(), assign=True)
    peer = diffusers_pipeline(bare, pipe.spec.ae_params, pipe.dtype)
    if compiled:
        peer.transformer.compile_repeated_blocks(fullgraph=True)
    texts = pipe.t5.hf_module, pipe.clip.hf_module, pipe.t5.tokenizer, pipe.clip.tokenizer

    def image() -> object:
        t5, clip, t5_tokenizer, clip_tokenizer = texts
        with torch.no_grad():
            ids = [
                tokenizer(
                    PROMPT, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                for tokenizer, length in (
                    (t5_tokenizer, pipe.t5.max_length),
                    (clip_tokenizer, pipe.clip.max_length),
                )
            ]
            txt = t5(ids[0]["input_ids"].to(pipe.device)).last_hidden_state
            vec = clip(ids[1]["input_ids"].to(pipe.device)).pooler_output
            return peer(
                prompt_embeds=txt, pooled_prompt_embeds=vec, width=side, height=side, guidance_scale=GUIDANCE,
                num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            )  # fmt: skip

    return image


def join_processes(benchmark: str, gpus: int, device: str) -> tuple[ProcessGroup, torch.device]:
    """Join the processes that share each run, and pick this one's device. If need be, start them all."""
    if gpus > 1 and not launched():
        start_processes(benchmark, gpus)
    group = join(gpus, device) if launched() else ALONE
    return group, group.device or pick_device(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one run."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def warm_up(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, dict]:
    """Make each run once, and note how long that took."""
    found = {}
    for name, work in runs.items():
        found[name] = {"warm_up_s": seconds(work, device), "s": []}
        print(f"{name}: the first time took {found[name]['warm_up_s']:.1f} s", flush=True)
    return found


def time_rounds(
    runs: Mapping[str, Callable[[], object]],
    found: dict[str, dict],
    rounds: int,
    device: torch.device,
    save: Callable[[], object],
) -> None:
    """Time so many rounds of all runs, and note the seconds of each and their median.

    `save` is called after each round, so that a benchmark that is stopped loses one at most.
    """
    for _ in range(rounds):
        for name, work in runs.items():
            found[name]["s"].append(seconds(work, device))
            found[name]["median_s"] = statistics.median(found[name]["s"])
            print(f"{name}: {found[name]['s'][-1]:.3f} s", flush=True)
        save()


@exit_on_input_error()
@only_rank_zero_prints()
def main(
    gpus: int = 1,
    output: str | None = None,
    rounds: int = 5,
    toy: bool = False,
    device: str = "auto",
    compiled: bool = True,
) -> None:
    """Run the benchmark.

    Args:
        gpus: number of GPUs that share each image
        output: JSON file to write to; if not set, one in output/benchmarks
        rounds: how many images each one makes after the first
        toy: measure tiny models, on any machine
        device: where to run: "auto", "cpu", "cuda"
        compiled: compile the blocks of the transformers
    """
    group, where = join_processes("benchmarks.whole_images", gpus, device)
    spec, steps, side = (toy_plan().spec, 2, 64) if toy else (configs["flux-dev"], STEPS, SIDE)
    spec = replace(spec, clip_length=77)
    ours = pipelines(spec, where, group, toy, compiled)
    size = {"width": side, "height": side, "num_steps": steps, "guidance": GUIDANCE, "progress": False}
    runs: dict[str, Callable[[], object]] = {
        name: lambda pipe=pipe: pipe.generate([PROMPT], [0], **size) for name, pipe in ours.items()
    }
    if group.rank == 0:
        runs["diffusers, bf16"] = peer_image(ours["ours, bf16"], steps, side, compiled)
    results: dict[str, Any] = {"machine": machine(where), "gpus": gpus, "steps": steps, "side": side}
    found = results["images"] = warm_up(runs, where)
    for pipe in ours.values():
        pipe.timings.clear()

    def save() -> None:
        for name, pipe in ours.items():
            done = len(found[name]["s"])
            found[name]["parts_s"] = {part: total / done for part, total in pipe.timings.items()}
        if group.rank == 0:
            write_json(output or f"output/benchmarks/whole_images_{gpus}.json", results)

    time_rounds(runs, found, rounds, where, save)
    print(table(found, gpus))


def table(found: dict[str, dict], gpus: int) -> str:
    """Format the results."""
    peer = found.get("diffusers, bf16", {}).get("median_s")
    rows = []
    for name, entry in found.items():
        parts = entry.get("parts_s", {})
        cells = [f"{parts[part]:.3f}" if part in parts else "-" for part in ("text", "denoise", "decode")]
        ratio = f"{peer / entry['median_s']:.2f}" if peer else "-"
        rows.append([name, f"{entry['median_s']:.3f}", ratio, *cells])
    header = [
        f"s an image, {gpus} GPU{'s' * (gpus > 1)}",
        "whole",
        "to diffusers",
        "text",
        "denoise",
        "decode",
    ]
    return markdown(header, rows)


if __name__ == "__main__":
    run(main, __doc__)
