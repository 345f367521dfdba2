"""Evaluates the trained models by a measuring model of another architecture, and times them.

    python -m training.evaluate samples                # after `python -m training all`
    python -m training.evaluate speed                  # on the CPU, with the files in flux/assets/nano

Writes evaluation.json, table.md and samples_*.png into FOLDER/evaluation. Edits are measured by
`training.evaluate_edits` on `training.benchmark`'s scenes.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.files import claim_folder
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.sampling import Conditioning, euler_step, get_noise, get_schedule, image_ids, pack, unpack
from flux.weights.load import read_weights
from training.arguments import Parser, at_least, start
from training.loop.cluster import Cluster
from training.loop.plan import Work
from training.loop.trainer import Budget
from training.scenes.compose import Scene, sample
from training.scenes.content import Content
from training.scenes.labels import labels_of
from training.scenes.render import Renderer
from training.scenes.vocabulary import INDEX
from training.stages.autoencoder import round_trip_psnr
from training.stages.flow import GUIDANCE, without_guidance
from training.stages.schnell import merged
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH
from training.stages.vision import MeasuringModel, Recognition, load_measuring, recognize

HELD_OUT_SEED = 987_654


class ExportedModels:
    """The exported files, loaded as the package loads them."""

    def __init__(self, work: Work, assets: Path):
        device, dtype = work.cluster.device, torch.float32
        self.work, self.device, self.assets = work, device, assets
        self.dev_weights = read_weights(assets / "transformer.safetensors", "cpu", dtype)
        self.lora = read_weights(assets / "schnell_lora.safetensors", "cpu", dtype)
        self.ae = AutoEncoder(work.sizes.ae)
        self.ae.load_state_dict(read_weights(assets / "ae.safetensors", "cpu", dtype))
        self.ae = self.ae.to(device).eval().requires_grad_(False)
        self.t5 = HFEmbedder(
            str(assets / "text_encoder_2"), T5_LENGTH, str(assets / "tokenizer_2"), dtype=dtype
        ).to(device)
        self.clip = HFEmbedder(
            str(assets / "text_encoder"), CLIP_LENGTH, str(assets / "tokenizer"), dtype=dtype
        ).to(device)

    def flux(self, name: str) -> Flux:
        """Build the transformer of "nano" or "schnell"."""
        if name == "nano":
            params, weights = replace(self.work.sizes.flux, guidance_embed=True), self.dev_weights
        else:
            params, weights = self.work.sizes.flux, merged(without_guidance(self.dev_weights), self.lora)
        flux = Flux(params)
        flux.load_state_dict(weights, assign=True)
        return flux.to(self.device).eval().requires_grad_(False)

    def conditioning(self, captions: Sequence[str], guidance: float) -> Conditioning:
        """Encode captions."""
        txt, vec = self.t5(list(captions)), self.clip(list(captions))
        txt_ids = torch.zeros(1, T5_LENGTH, 3, device=self.device).expand(len(captions), -1, -1)
        return Conditioning(txt, txt_ids, vec, torch.full((len(captions),), guidance, device=self.device))

    def noise(self, seeds: Sequence[int], side: int) -> Tensor:
        """Draw packed noise, a row for each seed."""
        return pack(torch.cat([get_noise(1, side, side, self.device, torch.float32, seed) for seed in seeds]))

    def decode(self, latents: Tensor, side: int) -> Tensor:
        """Decode packed latents to images in 0..1."""
        parts = [self.ae.decode(unpack(part, side, side)).clamp(-1, 1) for part in latents.split(32)]
        return (torch.cat(parts) + 1) / 2


def schedule(name: str, steps: int, side: int) -> list[float]:
    """Return the noise levels of "nano" or "schnell"."""
    return get_schedule(steps, (side // 16) ** 2, shift=name == "nano")


@torch.no_grad()
def generate_images(
    models: ExportedModels,
    flux: Flux,
    name: str,
    captions: Sequence[str],
    side: int,
    steps: int,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Generate images of captions, `B 3 H W` in 0..1."""
    images, levels = [], schedule(name, steps, side)
    for begin in range(0, len(captions), batch):
        part = captions[begin : begin + batch]
        cond = models.conditioning(part, GUIDANCE)
        latent = models.noise(range(seed + begin, seed + begin + len(part)), side)
        ids = image_ids(len(part), side, side, models.device)
        with torch.autocast(models.device.type, dtype=torch.bfloat16, enabled=models.device.type == "cuda"):
            for t, t_next in pairwise(levels):
                latent = euler_step(flux, latent, ids, cond, t, t_next).latent
        images.append(models.decode(latent.float(), side))
    return torch.cat(images)


# ---- samples


def score_samples(seen: Recognition, scenes: Sequence[Scene]) -> dict[str, float]:
    """Score recognized images by their scenes: the rows of the model card's table, each 0..1."""
    labels = labels_of(torch.tensor([scene.row() for scene in scenes]), seen.objects.device)
    every = torch.arange(len(scenes), device=seen.objects.device)
    found = (seen.objects > 0).float() * labels.objects
    scores = {
        "object, top-1 in set": labels.objects[every, seen.objects.argmax(1)].mean(),
        "objects, recall": found.sum() / labels.objects.sum(),
        "background": (seen.place.argmax(1) == labels.place).float().mean(),
        "time of day": (seen.time.argmax(1) == labels.time).float().mean(),
    }
    one_colour = labels.colours.sum(1) == 1
    hit = (seen.colours.argmax(1) == labels.colours.argmax(1)).float()
    scores["colour"] = hit[one_colour].mean()
    by_count = [(seen.count.argmax(1) == count)[labels.count == count].float().mean() for count in range(4)]
    scores["count 1-4"] = torch.stack([score for score in by_count if not score.isnan()]).mean()
    sides = [(n, scene) for n, scene in enumerate(scenes) if " of" in (scene.content.relation or "")]
    sides = [(n, scene) for n, scene in sides if scene.content.kind == "two"]
    right = [_on_its_side(seen.x[n], scene.content) for n, scene in sides]
    scores["left or right"] = torch.tensor(right, dtype=torch.float32).mean()
    worn = labels.worn.sum(1) > 0
    scores["hat"] = ((seen.worn > 0).float() * labels.worn).sum(1)[worn].mean()
    return {name: round(float(score), 4) for name, score in scores.items()}


def _on_its_side(x: Tensor, content: Content) -> bool:
    first, second = (x[INDEX[subject.name]] for subject in content.subjects)
    return bool(first < second) == ("left" in (content.relation or ""))


def evaluate_samples(
    models: ExportedModels, measuring: MeasuringModel, folder: Path, count: int, side: int, steps: int
) -> dict:
    """Score renders and images of both models for held-out captions, and the autoencoder's round trip."""
    rng = random.Random(HELD_OUT_SEED)
    scenes = [sample(rng) for _ in range(count)]
    captions = [scene.caption for scene in scenes]
    rows = torch.tensor([scene.row() for scene in scenes])
    renderer = Renderer(models.device)
    real = torch.cat([renderer(part, side, side, seed=7) for part in rows.split(64)])
    result: dict[str, Any] = {"real renders": score_samples(recognize(measuring, real)[0], scenes)}
    result["autoencoder, dB"] = round(round_trip_psnr(models.ae, (real[:128] * 255).round().byte()), 2)
    for name, model_steps in (("nano", steps), ("schnell", 4)):
        images = generate_images(models, models.flux(name), name, captions, side, model_steps)
        result[name] = score_samples(recognize(measuring, images)[0], scenes)
        save_sheet(folder / f"samples_{name}.png", images[:64], captions[:64], columns=8)
    return result


# ---- speed


def evaluate_speed() -> dict[str, float]:
    """Time what the model card promises on this machine's CPU, in seconds, through the public functions."""
    from flux.editing.edit import edit
    from flux.loaded_model import LoadedModel
    from flux.settings.complete import resolve
    from flux.settings.edits import EditSettings
    from flux.specs import configs
    from flux.vital_layers import find_vital_layers

    seconds = {}
    prompt, edits = "a dog on the grass", ("a cat on the grass",) * 3
    for name in [name for name in ("flux-nano", "flux-nano-schnell") if name in configs]:
        settings = resolve(EditSettings(prompt=prompt, edits=edits, model=name, device="cpu", batch_size=3))
        begin = time.perf_counter()
        pipe = LoadedModel.load(settings)
        seconds[f"{name}: load"] = time.perf_counter() - begin
        layers, sampling = find_vital_layers("auto", pipe.spec), settings.sampling()
        pipe.generate([prompt], [0], progress=False, **sampling)  # the first image is slower
        begin = time.perf_counter()
        pipe.generate([prompt], [0], progress=False, **sampling)
        generated = time.perf_counter()
        edit(pipe, settings, layers, progress=False)
        seconds[f"{name}: image"] = generated - begin
        seconds[f"{name}: reference and 3 edits"] = time.perf_counter() - generated
    return {name: round(value, 2) for name, value in seconds.items()}


# ---- writing


def save_sheet(path: Path, images: Tensor, captions: Sequence[str], columns: int) -> None:
    """Write a sheet of images with captions as PNG."""
    from flux.images.io import to_pil
    from flux.images.sheets import grid

    tiles = [to_pil(image.cpu() * 2 - 1) for image in images]
    starts = range(0, len(tiles), columns)
    rows = [tiles[begin : begin + columns] for begin in starts]
    sheet = grid(rows, [list(captions[begin : begin + columns]) for begin in starts])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def table(result: dict) -> str:
    """Format the results as Markdown."""
    lines = []
    if "samples" in result:
        scores = result["samples"]
        names = ("real renders", "nano", "schnell")
        lines += ["| held-out captions | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in scores["real renders"]:
            lines.append(f"| {row} | " + " | ".join(f"{scores[name][row]:.3f}" for name in names) + " |")
        lines += ["", f"Autoencoder round trip: {scores['autoencoder, dB']:.1f} dB", ""]
    if "speed" in result:
        lines += ["| on this CPU | seconds |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in result["speed"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    summary = (__doc__ or "").splitlines()[0]
    parser = Parser(prog="python -m training.evaluate", description=summary)
    parser.add_argument("parts", nargs="+", choices=("samples", "speed"), help="what is measured")
    parser.add_argument("--folder", type=Path, default=Path("output/training"), help="that of the training")
    parser.add_argument("--assets", type=Path, help="the exported files; default: FOLDER/assets")
    parser.add_argument("--captions", type=at_least(1), default=512, help="number of captions")
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps of flux-nano's images")
    parser.add_argument("--toy", action="store_true", help="the training was one with --toy")
    arguments = parser.parse_args()
    assets = arguments.assets or arguments.folder / "assets"
    needed = [assets / "transformer.safetensors", arguments.folder / "measuring.pt"]
    if "samples" in arguments.parts and (missing := [str(path) for path in needed if not path.is_file()]):
        parser.error(
            f"samples needs {' and '.join(missing)}: train first (python -m training all), or give another "
            "--folder or --assets"
        )

    budget = Budget(1e6, time.time())
    work = (Work.toy if arguments.toy else Work)(Cluster.join(), arguments.folder, budget)
    folder = arguments.folder / "evaluation"
    claim_folder(folder)
    saved = folder / "evaluation.json"
    result = json.loads(saved.read_text()) if saved.exists() else {}
    if "speed" in arguments.parts:
        result["speed"] = evaluate_speed()
    if "samples" in arguments.parts:
        models, measuring = ExportedModels(work, assets), load_measuring(work)
        result["samples"] = evaluate_samples(
            models, measuring, folder, arguments.captions, side=work.side, steps=arguments.steps
        )
    saved.write_text(json.dumps(result, indent=1))
    (folder / "table.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    start(main)
