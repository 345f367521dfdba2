"""Every stage at toy size, from tokenizers to files that the package's own code loads, and the evaluation of
them.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux.model import Flux
from flux.modules.conditioner import HFEmbedder
from flux.weights.load import read_weights
from training.evaluate import Nets, evaluate_samples, generate, score_samples, table
from training.loop.cluster import Cluster
from training.loop.models import DINO_SIDE
from training.loop.plan import TOY_PLAN, Work
from training.loop.trainer import Budget
from training.scenes.labels import labels_of
from training.stages.autoencoder import train_autoencoder
from training.stages.export import export, take_over
from training.stages.flow import first_generator, train_flow, train_guidance, without_guidance
from training.stages.schnell import merged, train_schnell
from training.stages.text import train_text
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH
from training.stages.vision import Recognition, load_measuring, normalized, train_dinov2, train_measuring

ROOT = Path(__file__).parents[2]
MOMENT = {name: replace(stage, seconds=0.01) for name, stage in TOY_PLAN.items()}


@pytest.fixture(scope="module")
def work(tokenizers, tmp_path_factory) -> Work:
    """All stages done, one or two iterations each."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "tokenizers").symlink_to(tokenizers)
    work = replace(Work.toy(Cluster.join(), folder, Budget(60, time.time())), plan=MOMENT, side=32)
    assert train_autoencoder(work)
    assert train_text(work)
    assert train_flow(work, "flow128")
    assert train_flow(work, "flow256")
    assert train_guidance(work)
    assert train_schnell(work)
    assert train_dinov2(work)
    assert train_measuring(work)
    assert export(work)
    return work


def test_exported_files_load_as_the_package_loads_them(work):
    assets = work.folder / "assets"
    weights = read_weights(assets / "transformer.safetensors", "cpu", torch.float32)
    Flux(replace(work.sizes.flux, guidance_embed=True)).load_state_dict(weights)
    lora = read_weights(assets / "schnell_lora.safetensors", "cpu", torch.float32)
    Flux(work.sizes.flux).load_state_dict(merged(without_guidance(weights), lora))
    t5 = HFEmbedder(
        str(assets / "text_encoder_2"), T5_LENGTH, str(assets / "tokenizer_2"), dtype=torch.float32
    )
    clip = HFEmbedder(
        str(assets / "text_encoder"), CLIP_LENGTH, str(assets / "tokenizer"), dtype=torch.float32
    )
    assert t5(["a dog", ""]).shape == (2, T5_LENGTH, work.sizes.flux.context_in_dim)
    features = clip(["a dog", "a cat"])
    assert features.shape == (2, work.sizes.flux.vec_in_dim)
    assert not torch.equal(features[0], features[1])


def test_exported_files_are_trained_further(work, tmp_path):
    """What begins is the guided model at guidance 1, with its own encoders; the rest is taken over."""
    further = replace(work, folder=tmp_path, begin=work.folder / "assets")
    take_over(further)
    begun, nets = first_generator(further).eval(), Nets(work, further.begin)
    ids, t = torch.zeros(1, 4, 3), torch.tensor([0.4])
    x, txt_ids = torch.randn(1, 4, 64), torch.zeros(1, T5_LENGTH, 3)
    cond = nets.conditioning(["a dog"], 1.0)
    with torch.no_grad():
        guided = nets.flux("nano")(x, ids, cond.txt, txt_ids, t, cond.vec, cond.guidance)
        torch.testing.assert_close(begun.flux(x, ids, cond.txt, txt_ids, t, cond.vec), guided)
    assert train_text(further)
    assert train_flow(further, "flow256")
    assert (tmp_path / "flow128.done").exists()
    assert not (tmp_path / "flow128.pt").exists()


def test_the_perceptual_encoder_loads_as_the_package_loads_it(work):
    """Pictures are prepared as they were in training: squeezed to the encoder's side, whatever their own."""
    from PIL import Image

    from flux.metrics.features import PerceptualEncoder

    encoder = PerceptualEncoder.load(work.folder / "assets" / "dinov2")
    pictures = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
    features = encoder.embed(pictures)
    assert features.shape == (2, work.sizes.dino_width)
    pixels = encoder.processor(pictures, return_tensors="pt")["pixel_values"]
    flat = torch.tensor((1.0, 0.0, 0.0)).view(1, 3, 1, 1).expand(1, 3, DINO_SIDE, DINO_SIDE)
    torch.testing.assert_close(pixels[:1], normalized(flat))


def test_logs_are_written(work):
    for stage in TOY_PLAN:
        assert (work.folder / f"{stage}.csv").read_text().startswith("iteration,seconds,samples,loss")


def test_a_stage_stops_at_its_budget_and_goes_on(work, tmp_path):
    """Stopped training resumes with the same iteration count, and finishes; the second part continues the
    log.
    """
    plan = {**MOMENT, "dinov2": replace(TOY_PLAN["dinov2"], seconds=0.6)}
    early = replace(work, folder=tmp_path, plan=plan, budget=Budget(15.05 / 60, time.time()))
    (tmp_path / "tokenizers").symlink_to(work.tokenizers)
    assert not train_dinov2(early)
    assert not (tmp_path / "assets").exists()
    saved = torch.load(tmp_path / "dinov2.state.pt", weights_only=True)["progress"]
    assert train_dinov2(replace(early, budget=Budget(60, time.time())))
    done = torch.load(tmp_path / "dinov2.state.pt", weights_only=True)["progress"]
    assert done[0] > saved[0]
    assert done[2] >= 0.6


def test_samples_are_scored(work, tmp_path):
    nets = Nets(work, work.folder / "assets")
    result = {
        "samples": evaluate_samples(nets, load_measuring(work), tmp_path, count=8, side=work.side, steps=2)
    }
    assert (tmp_path / "samples_nano.png").exists()
    assert "| background |" in table(result)
    images = generate(nets, nets.flux("schnell"), "schnell", ["a dog", "a cat"], work.side, 4)
    assert images.shape == (2, 3, work.side, work.side)
    assert images.min() >= 0
    assert images.max() <= 1


def perfect(scenes) -> Recognition:
    """What a net that makes no mistakes sees."""
    labels = labels_of(torch.tensor([scene.row() for scene in scenes]))
    one_hot = torch.nn.functional.one_hot
    return Recognition(
        20 * labels.objects - 10, 20 * labels.worn - 10, 20 * labels.colours - 10,
        one_hot(labels.place, 16).float(), one_hot(labels.time, 3).float(), one_hot(labels.count, 4).float(),
        labels.x,
    )  # fmt: skip


def test_perfect_sight_scores_one():
    import random

    from training.scenes.compose import sample

    scenes = [sample(random.Random(seed)) for seed in range(300)]
    assert set(score_samples(perfect(scenes), scenes).values()) == {1.0}
    blind = Recognition(*(torch.zeros_like(value) for value in vars(perfect(scenes)).values()))
    assert score_samples(blind, scenes)["objects, recall"] == 0


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    """torchrun with gloo on the CPU: every stage, and one set of files at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*command, "-m", "training", "all", "--toy", "--stretch", "0.5", "--folder", str(tmp_path)],
        cwd=ROOT, env=environment, check=True, timeout=600,
    )  # fmt: skip
    assert (tmp_path / "export.done").exists()
