"""Compares flux-nano with 8-bit products, and with a step cache, with itself: error and steps spared.

    python -m benchmarks.nano_speed [--size 128] [--num_steps 20] [--device cpu] [--output FILE.json]

The relative error of the velocity is averaged over the steps of the plain run. No times, since they depend on
the GPU.
"""

import statistics
from dataclasses import replace

from flux.errors import exit_on_input_error
from flux.settings.command_line import run

PROMPTS = ("a photo of a dog on the grass", "a photo of a red house by the sea")
THRESHOLDS = (0.08, 0.12, 0.2)


@exit_on_input_error()
def main(size: int = 128, num_steps: int = 20, device: str = "cpu", output: str | None = None) -> None:
    """Runs the benchmark.

    Args:
        size: width and height of the images in pixels
        num_steps: denoising steps
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        output: JSON file to write to; if not set, none is written
    """
    from benchmarks.common import machine, markdown, velocity_error
    from flux import sampling
    from flux.files import write_json
    from flux.loaded_model import LoadedModel
    from flux.metrics.pixels import psnr_or_none
    from flux.model import Flux
    from flux.modules.step_cache import StepCache
    from flux.runtime.quantize import to_fp8
    from flux.settings.complete import resolve
    from flux.settings.demos import ModelSettings

    settings = resolve(ModelSettings(device=device, width=size, height=size, num_steps=num_steps))
    pipe = LoadedModel.load(settings)
    fp8 = Flux(pipe.spec.params).to(pipe.device, pipe.dtype).eval().requires_grad_(False)
    fp8.load_state_dict(pipe.model.state_dict())
    to_fp8([fp8.double_blocks, fp8.single_blocks])
    levels, ids = pipe.schedule(num_steps, size, size), pipe.image_ids(1, size, size)

    def run(model: Flux, prompt: str, seed: int, cache: StepCache | None = None) -> tuple[list, object]:
        other = replace(pipe, model=model)
        cond, noise = other.condition([prompt], settings.guidance), other.noise([seed], size, size)
        with other.denoising() as denoiser:
            steps = list(sampling.sample(denoiser, noise, ids, cond, levels, cache=cache))
        return steps, other.decode(steps[-1].latent, size, size)[0]

    found: dict[str, dict[str, list[float]]] = {}
    for seed, prompt in enumerate(PROMPTS):
        steps, own = run(pipe.model, prompt, seed)
        near = found.setdefault("fp8", {"psnr": [], "velocity_error": []})
        cond = pipe.condition([prompt], settings.guidance)
        near["velocity_error"].append(velocity_error(fp8, steps, ids, cond))
        near["psnr"].append(psnr_or_none(own, run(fp8, prompt, seed)[1]))
        for threshold in THRESHOLDS:
            cache = StepCache(threshold)
            entry = found.setdefault(f"cache {threshold}", {"psnr": [], "spared": []})
            entry["psnr"].append(psnr_or_none(own, run(pipe.model, prompt, seed, cache)[1]))
            entry["spared"].append(cache.reused / num_steps)

    def shown(entry: dict, name: str, form: str) -> str:
        if name not in entry:
            return "-"
        # Equal images have no PSNR.
        known = [x for x in entry[name] if x is not None]
        return format((min if name == "psnr" else statistics.mean)(known), form) if known else "equal"

    rows = [
        [name, shown(each, "psnr", ".1f"), shown(each, "velocity_error", ".4f"), shown(each, "spared", ".0%")]
        for name, each in found.items()
    ]
    print(f"{size}x{size}, {num_steps} steps, {len(PROMPTS)} pictures")
    print(markdown(["", "least PSNR, dB", "velocity's relative error", "steps spared"], rows))
    if output:
        about = {"command": f"python -m benchmarks.nano_speed --size {size} --num_steps {num_steps}"}
        about |= {"machine": machine(pipe.device), "prompts": PROMPTS}
        write_json(output, {**about, "results": found})


if __name__ == "__main__":
    run(main, __doc__)
