"""Training on pairs: the image before, the instruction, and the image after."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import lora_training, tiny_models
from helpers.lora_training import settings
from PIL import Image, ImageOps
from safetensors.torch import load_file

from flux.errors import InputError
from flux.lora.adapters import add_adapters, prepare_backward
from flux.lora.dataset import pair_size, read_training_set
from flux.lora.features import Features
from flux.lora.train import make_plan, train
from flux.lora.trainer import Trainer
from flux.model import Flux
from flux.runtime.activations import LiveBytes
from flux.runtime.parallel import ALONE
from flux.specs import configs

pytestmark = pytest.mark.gradients

SPEC = replace(lora_training.SPEC, condition="kontext")


@pytest.fixture(autouse=True)
def kontext(monkeypatch):
    """flux-nano's transformer, small and steered by context images."""
    monkeypatch.setitem(configs, "flux-nano", SPEC)


def write_pairs(folder: Path) -> Path:
    """Three of the images, each made of its negative, in 64x64 and 128x64."""
    lora_training.write_images(folder)
    for path in [*folder.glob("3.*")]:
        path.unlink()
    (folder / "context").mkdir()
    for path in folder.glob("*.png"):
        ImageOps.invert(Image.open(path)).save(folder / "context" / f"{path.stem}.jpg")
    return folder


def given(folder: Path, output: str = "out", **fields):
    if not (folder / "images").exists():
        write_pairs(folder / "images")
    usual = {"sizes": [64], "steps": 4, "save_every": 2, "sample_every": 4, "caption_dropout": 0.0}
    return settings(folder, output, **{**usual, **fields})


def trainer_of(plan) -> Trainer:
    """A trainer on random features."""
    model = tiny_models.randomized(Flux(plan.spec.params), 0)
    adapters = add_adapters(model, plan.targets, 0, "cpu")
    generator, params = torch.Generator().manual_seed(0), plan.spec.params
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.1, generator=generator)
    prepare_backward(model, min(plan.layers), plan.forecast.checkpointing)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    latents, contexts = (
        [draw(each.width // 16 * (each.height // 16), 64) for each in plan.training.examples] for _ in "ab"
    )
    texts = plan.training.captions
    txt = {text: draw(plan.spec.text_length, params.context_in_dim) for text in texts}
    features = Features(latents, txt, {text: draw(params.vec_in_dim) for text in texts}, None, contexts)
    return Trainer(plan.settings, plan.spec, model, adapters, plan.training, features, ALONE)


# ---- the loss


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_the_loss_is_that_of_the_noise_tokens_alone(tmp_path, monkeypatch, checkpointing):
    """Computed anew with all tokens in one sequence, whose second half is the context of index 1."""
    trainer = trainer_of(make_plan(given(tmp_path, checkpointing=checkpointing)))
    seen, observe = [], Flux.observe

    def observed(model: Flux, inputs, *rest, **named):
        seen.append(inputs)
        return observe(model, inputs, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Flux, "observe", observed)
        losses = [trainer.take_step() for _ in range(3)]
    again = trainer_of(make_plan(given(tmp_path, checkpointing=checkpointing)))
    features = again.features
    numbers = [
        next(n for n, x in enumerate(features.contexts) if torch.equal(x, inputs.condition.context))
        for inputs in seen
    ]
    assert sorted(numbers) == [0, 1, 2]
    for loss, inputs, number in zip(losses, seen, numbers):
        rows, columns = (3, 6) if number == 2 else (4, 4)  # of 96x48 and 64x64
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        ids = [torch.cat((torch.full((len(places), 1), float(index)), places), dim=1) for index in (0, 1)]
        latent, t = features.latents[number], inputs.timesteps
        noise = (inputs.img - (1 - t) * latent) / t
        tokens = torch.cat((inputs.img, features.contexts[number]), dim=1)
        with torch.no_grad():
            velocity = again.model(
                tokens, torch.cat(ids)[None], inputs.txt, inputs.txt_ids, t, inputs.y, inputs.guidance
            )[:, : len(places)]
        expected = (velocity - (noise - latent)).square().mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert again.take_step() == loss


def test_a_step_takes_what_was_forecast(tmp_path, monkeypatch):
    """Context tokens included: measured 1.01."""
    fields = given(tmp_path, rank=1, checkpointing="off", batch_size=2)
    for path in Path(fields.images).rglob("2.*"):
        path.unlink()  # the only pair of another shape
    plan = make_plan(fields)
    trainer = trainer_of(plan)
    trainer.take_step()
    held = [*trainer.model.parameters(), *trainer.model.buffers()]
    held += [x for state in trainer.optimizer.state.values() for x in state.values()]
    with LiveBytes(held) as live:
        trainer.take_step()
    monkeypatch.setitem(configs, "flux-nano", lora_training.SPEC)
    with pytest.warns(match="context is not used"):
        of_images = make_plan(fields)
    peaks = [
        next(stage.activations for stage in each.forecast.stages if stage.name == "train")
        for each in (plan, of_images)
    ]
    assert 0.97 < live.peak / (peaks[0] + 4 * plan.forecast.parameters) < 1.06
    assert peaks[0] > 1.03 * peaks[1]


# ---- whole trainings


def test_a_training_on_pairs(tmp_path):
    """Samples have the context image and the size of their pair; a training that resumes ends the same."""
    prompts = ["a flower bell at night", "a [trigger] on the grass", "a [trigger] on the snow"]
    whole = given(tmp_path, "whole", sample_prompts=prompts)
    train(whole)
    sizes = [Image.open(tmp_path / "whole" / "samples" / f"step_000004_{n}.png").size for n in range(3)]
    # The second sample's prompt is the caption of the first and the last pair: it begins with the last one.
    assert sizes == [(64, 64), (96, 48), (64, 64)]
    features = load_file(tmp_path / "whole" / "features.safetensors")
    assert [features[f"context.{n}"].shape for n in range(3)] == [
        features[f"latent.{n}"].shape for n in range(3)
    ]
    assert not torch.equal(features["context.0"], features["latent.0"])
    for steps in (2, 4):
        train(given(tmp_path, "halves", sample_prompts=[], steps=steps))
    same = [(tmp_path / name / "lora.safetensors").read_bytes() for name in ("whole", "halves")]
    assert same[0] == same[1]


def test_another_context_image_is_another_training(tmp_path):
    before = read_training_set(given(tmp_path), SPEC)
    path = tmp_path / "images" / "context" / "0.jpg"
    ImageOps.mirror(Image.open(path)).save(path)
    assert read_training_set(given(tmp_path), SPEC).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((1024, 1024), 1024, (1024, 1024)), ((1600, 1200), 1024, (1184, 880)), ((300, 300), 1024, (304, 304))],
)
def test_pairs_have_the_sizes_of_kontext(shape, size, expected):
    assert pair_size(*shape, size) == expected


def test_which_pair_a_sample_begins_with(tmp_path):
    training = read_training_set(given(tmp_path, sizes=[64, 48]), SPEC)
    assert [example.width for example in training.examples] == [64, 48, 64, 48, 96, 64]
    caption = training.examples[2].caption
    assert [training.pair_of(caption, number) for number in range(2)] == [2, 2]
    shared = training.examples[0].caption
    assert [training.pair_of(shared, number) for number in range(3)] == [0, 4, 0]
    assert [training.pair_of("another", number) for number in range(4)] == [0, 2, 4, 0]


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda images: shutil.rmtree(images / "context"), "without a folder context, but flux-nano is"),
        (lambda images: (images / "context" / "1.jpg").unlink(), r"1\.png with 0 images of that name"),
        (lambda images: shutil.copy(images / "1.png", images / "context"), r"1\.png with 2 images"),
        (lambda images: (images / "1.png").unlink(), r"1\.jpg, but no image of that name"),
        (
            lambda images: Image.new("RGB", (64, 128)).save(images / "context" / "1.jpg"),
            r"1\.png of 64x64 and .*1\.jpg of 64x128: expected both in one shape",
        ),
        (
            lambda images: Image.new("RGB", (9, 9)).save(images / "context" / "1.jpg"),
            r"1\.jpg of 9x9 pixels: expected at least 64",
        ),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(tmp_path, change, match):
    fields = given(tmp_path)
    change(Path(fields.images))
    with pytest.raises(InputError, match=match) as error:
        make_plan(fields)
    assert len(str(error.value).splitlines()) == 1


def test_samples_have_no_size_of_their_own(tmp_path):
    with pytest.raises(InputError, match="samples of flux-nano have the sizes of their context images"):
        make_plan(given(tmp_path, width=64))
