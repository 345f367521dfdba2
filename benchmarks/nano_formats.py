"""Compares flux-nano in 8-bit floats and in each kind of GGUF with itself in float32: images and edits.

    python -m benchmarks.nano_formats [--size 256] [--num_steps 20] [--edits 6] [--device auto]
                            [--folder FOLDER] [--output output/benchmarks/nano_formats.json]

Writes the files (into FOLDER, else a temporary one), loads each as a user would, and makes the reference and
the first edits of configs/edit.json. Small differences may or may not grow on the path to an image, so the
table also has the relative error of the velocity, averaged over four noise levels of one path. Writes the
table as Markdown beside the JSON. Needs the `gguf` package.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import machine, markdown, velocity_error
from benchmarks.k_quants import KINDS, quantize
from flux.editing.edit import edit
from flux.errors import exit_on_input_error
from flux.files import write_json, write_text
from flux.loaded_model import LoadedModel
from flux.metrics.pixels import psnr_or_none
from flux.model import Flux
from flux.sampling import Step, sample
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings
from flux.settings.files import read_settings
from flux.settings.resolved import ResolvedEdit
from flux.specs import NANO_FOLDER
from flux.vital_layers import find_vital_layers
from flux.weights.gguf import SIZES
from flux.weights.load import read_weights
from flux.weights.open_model import ModelFiles, OpenModel

# The kinds that quantisers use instead if rows are no multiple of 256.
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

PATH_STEPS = 4
EIGHT_BIT_FLOATS = ("fp8 scaled", "fp8 e4m3", "fp8 e5m2")


def write_gguf(weights: dict[str, Tensor], path: Path, kind: str) -> float:
    """Write the blocks' matrices in that kind, and return the share of them that have it."""
    writer, of_kind, packed = gguf.GGUFWriter(path, "flux"), 0, 0
    for name, x in weights.items():
        data, own = x.numpy(), "F32"
        if x.ndim == 2 and "blocks." in name:
            own = kind if kind not in KINDS or x.shape[1] % 256 == 0 else INSTEAD[kind]
            of_kind, packed = of_kind + x.numel() * (own == kind), packed + x.numel()
        quantization = gguf.GGMLQuantizationType[own]
        data = quantize(data, own) if own in KINDS else gguf.quantize(data, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return of_kind / packed


def write_fp8(weights: dict[str, Tensor], path: Path, kind: str) -> float:
    """Write all tensors cast to 8 bits, or matrices with a scale each. Return 1."""
    if kind == "fp8 scaled":
        file = {}
        for name, x in weights.items():
            file[name] = x.half()
            if x.ndim == 2:
                scale = x.abs().max() / 448
                file[name] = (x / scale).to(torch.float8_e4m3fn)
                file[name.removesuffix(".weight") + ".scale_weight"] = scale
    else:
        dtype = torch.float8_e4m3fn if kind == "fp8 e4m3" else torch.float8_e5m2
        file = {name: x.to(dtype) for name, x in weights.items()}
    save_file(file, path)
    return 1.0


class Original:
    """flux-nano with its own weights in float32, to compare other forms of its weights with.

    Args:
        settings: The edits to make.
    """

    def __init__(self, settings: ResolvedEdit):
        self.settings = settings
        self.loaded = LoadedModel.load(settings)
        self.spec = self.loaded.spec
        self.layers = find_vital_layers(settings.vital_layers, self.spec)
        self.own_images = self.images(self.loaded.model)
        self.cond = self.loaded.condition([settings.prompt or ""], settings.guidance)
        self.ids = self.loaded.image_ids(1, settings.width, settings.height)

    def images(self, model: Flux) -> list[Image.Image]:
        """Make the reference and the edits by a transformer of any form."""
        made = edit(replace(self.loaded, model=model), self.settings, self.layers, progress=False)
        return [made.reference, *made.edits]

    def path(self) -> list[Step]:
        """Take a few steps by the original's transformer."""
        width, height = self.settings.width, self.settings.height
        noise = self.loaded.noise([self.settings.seed], width, height)
        with self.loaded.denoising() as model:
            return list(
                sample(model, noise, self.ids, self.cond, self.loaded.schedule(PATH_STEPS, width, height))
            )

    def compare(self, model: Flux, path: list[Step]) -> dict[str, object]:
        """Measure how far a transformer's images and velocities are from the original's."""
        reference, *edits = (psnr_or_none(*pair) for pair in zip(self.own_images, self.images(model)))
        error = velocity_error(model, path, self.ids, self.cond)
        return {"reference_psnr": reference, "edits_psnr": edits, "velocity_error": error}


def measure(original: Original, folder: Path, keep: bool) -> Iterator[dict]:
    """Write flux-nano's transformer in each form, load it as a user would, and compare it.

    Args:
        original: The model to compare with.
        folder: The folder of the files.
        keep: Whether the files stay.
    """
    spec, path = original.spec, original.path()
    weights = read_weights(NANO_FOLDER / spec.repo_flow, "cpu", torch.float32)
    for kind in (*EIGHT_BIT_FLOATS, *sorted(SIZES, key=lambda kind: -bits(kind))):
        file = folder / f"flux-nano-{kind.replace(' ', '-')}"
        share = (write_fp8 if kind in EIGHT_BIT_FLOATS else write_gguf)(weights, file, kind)
        opened = OpenModel(spec, ModelFiles(file, file, file))
        model = opened.load_transformer(original.loaded.device, torch.float32, keep_8bit=True)
        found = {"kind": kind, "bytes": file.stat().st_size, "share": share}
        yield found | original.compare(model, path)
        if not keep:
            file.unlink()


def table(results: list[dict]) -> str:
    """Format the results."""
    rows = [
        [
            result["kind"],
            f"{result['bytes'] / 2**20:.1f}",
            f"{100 * result['share']:.0f} %",
            f"{result['velocity_error']:.4f}",
            decibel([result["reference_psnr"]]),
            decibel(result["edits_psnr"]),
        ]
        for result in results
    ]
    return markdown(["form", "MiB", "in this form", "velocity error", "reference dB", "edits dB"], rows)


def bits(kind: str) -> float:
    """Compute the bits of a number."""
    numbers, size = SIZES[kind]
    return 8 * size / numbers


def decibel(values: list[float | None]) -> str:
    """Format the mean PSNR. Equal images have none."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1f}" if known else "equal"


@exit_on_input_error()
def main(
    size: int = 256,
    num_steps: int = 20,
    edits: int = 6,
    device: str = "auto",
    folder: str | None = None,
    output: str = "output/benchmarks/nano_formats.json",
) -> None:
    """Run the benchmark.

    Args:
        size: width and height of the images in pixels
        num_steps: denoising steps
        edits: number of edits of configs/edit.json
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        folder: folder of the files; if not set, a temporary one
        output: JSON file to write to
    """
    wanted = {"num_steps": num_steps, "width": size, "height": size, "device": device, "dtype": "float32"}
    settings = resolve(read_settings(EditSettings, "edit.json", wanted))
    original = Original(settings.model_copy(update={"edits": settings.edits[:edits]}))
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(folder or temporary)
        home.mkdir(parents=True, exist_ok=True)
        for found in measure(original, home, keep=folder is not None):
            results.append(found)
            print(found, flush=True)
    print(table(results))
    about = {"machine": machine(original.loaded.device), "size": size, "num_steps": num_steps, "edits": edits}
    write_json(output, {**about, "results": results})
    write_text(Path(output).with_suffix(".md"), table(results) + "\n")


if __name__ == "__main__":
    run(main, __doc__)
