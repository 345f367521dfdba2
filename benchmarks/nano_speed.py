"""Compares flux-nano with 8-bit products, and with a step cache, with itself: error and steps spared.

    python -m benchmarks.nano_speed [--size 128] [--num_steps 20] [--device cpu] [--output FILE.json]

The relative error of the velocity is averaged over the steps of the plain run. No times, since they depend on
the GPU.
"""

import statistics
from dataclasses import replace

from PIL import Image

from benchmarks.common import machine, markdown, velocity_error
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.metrics.pixels import psnr_or_none
from flux.model import Flux
from flux.modules.step_cache import StepCache
from flux.runtime.quantize import to_fp8
from flux.sampling import Step, sample
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.settings.resolved import ResolvedModel

PROMPTS = ("a photo of a dog on the grass", "a photo of a red house by the sea")
THRESHOLDS = (0.08, 0.12, 0.2)
Found = dict[str, dict[str, list[float | None]]]


def fp8_copy(loaded: LoadedModel) -> Flux:
    """Copy the transformer and let it compute in 8-bit floats."""
    model = Flux(loaded.spec.params).to(loaded.device, loaded.dtype).eval().requires_grad_(False)
    model.load_state_dict(loaded.model.state_dict())
    to_fp8([model.double_blocks, model.single_blocks])
    return model


def measure(loaded: LoadedModel, settings: ResolvedModel) -> Found:
    """Compare each variant with the plain model, for each prompt.

    Returns:
        Each variant's PSNR to the plain image in dB (None if it is equal), and its velocity's relative error
        or the fraction of steps that it spared.
    """
    width, height, num_steps = settings.width, settings.height, settings.num_steps
    fp8, ids = fp8_copy(loaded), loaded.image_ids(1, width, height)
    levels = loaded.schedule(num_steps, width, height)

    def make(
        model: Flux, prompt: str, seed: int, cache: StepCache | None = None
    ) -> tuple[list[Step], Image.Image]:
        other = replace(loaded, model=model)
        cond, noise = other.condition([prompt], settings.guidance), other.noise([seed], width, height)
        with other.denoising() as denoiser:
            steps = list(sample(denoiser, noise, ids, cond, levels, cache=cache))
        return steps, other.decode(steps[-1].latent, width, height)[0]

    found: Found = {"fp8": {"psnr": [], "velocity_error": []}}
    found |= {f"cache {threshold}": {"psnr": [], "spared": []} for threshold in THRESHOLDS}
    for seed, prompt in enumerate(PROMPTS):
        steps, plain = make(loaded.model, prompt, seed)
        cond = loaded.condition([prompt], settings.guidance)
        found["fp8"]["velocity_error"].append(velocity_error(fp8, steps, ids, cond))
        found["fp8"]["psnr"].append(psnr_or_none(plain, make(fp8, prompt, seed)[1]))
        for threshold in THRESHOLDS:
            cache, entry = StepCache(threshold), found[f"cache {threshold}"]
            entry["psnr"].append(psnr_or_none(plain, make(loaded.model, prompt, seed, cache)[1]))
            entry["spared"].append(cache.reused / num_steps)
    return found


def table(found: Found) -> str:
    """Format the worst image's PSNR, and means of the rest."""
    rows = []
    for name, entry in found.items():
        cells = []
        for measure, form in {"psnr": ".1f", "velocity_error": ".4f", "spared": ".0%"}.items():
            values = [x for x in entry.get(measure, []) if x is not None]
            if measure not in entry:
                cells.append("-")
            elif values:
                cells.append(format(min(values) if measure == "psnr" else statistics.mean(values), form))
            else:  # equal images have no PSNR
                cells.append("equal")
        rows.append([name, *cells])
    return markdown(["", "least PSNR, dB", "velocity's relative error", "steps spared"], rows)


@exit_on_input_error()
def main(size: int = 128, num_steps: int = 20, device: str = "cpu", output: str | None = None) -> None:
    """Run the benchmark.

    Args:
        size: width and height of the images in pixels
        num_steps: denoising steps
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        output: JSON file to write to; if not set, none is written
    """
    settings = resolve(ModelSettings(device=device, width=size, height=size, num_steps=num_steps))
    loaded = LoadedModel.load(settings)
    found = measure(loaded, settings)
    print(f"{size}x{size}, {num_steps} steps, {len(PROMPTS)} images")
    print(table(found))
    if output:
        about = {"command": f"python -m benchmarks.nano_speed --size {size} --num_steps {num_steps}"}
        about |= {"machine": machine(loaded.device), "prompts": PROMPTS}
        write_json(output, {**about, "results": found})


if __name__ == "__main__":
    run(main, __doc__)
