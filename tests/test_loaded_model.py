"""Prompts in, images out: flux-nano end to end against diffusers' pipeline, and what the pipeline adds."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.images import difference
from safetensors.torch import save_file

from flux import sampling
from flux.errors import InputError
from flux.loaded_model import LoadedModel, count_evaluations
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.specs import NANO_FOLDER, configs
from flux.weights.open_model import OpenModel

DOG = "a dog wearing a top hat on the grass"
CAR = "a red car on the street"
QUICK = {"width": 128, "height": 96, "num_steps": 3, "guidance": 3.5, "true_cfg": 1.0, "progress": False}


# ---- against diffusers


@pytest.mark.parametrize(
    ("prompts", "width", "height", "num_steps", "true_cfg", "negative"),
    [
        ([DOG], 256, 256, 6, 1.0, ""),
        pytest.param([DOG], 256, 256, 20, 1.0, "", marks=pytest.mark.slow),
        ([DOG, CAR], 128, 192, 4, 3.5, "a cat"),
        ([CAR], 192, 96, 4, 1.0, ""),
    ],
    ids=["square", "as shipped", "two, upright, with a negative prompt", "wide"],
)
def test_images_equal_diffusers(nano, nano_diffusers, prompts, width, height, num_steps, true_cfg, negative):
    """The same files, tokenizers, noise and steps through both: the whole path, within 1/255."""
    seeds = list(range(7, 7 + len(prompts)))
    expected = nano_diffusers(
        prompts,
        negative_prompt=[negative] * len(prompts),
        true_cfg_scale=true_cfg,
        width=width,
        height=height,
        num_inference_steps=num_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=40,
    ).images
    got = nano.generate(
        prompts,
        seeds,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=3.5,
        true_cfg=true_cfg,
        negative_prompt=negative,
        progress=False,
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.size == theirs.size == (width, height)
        assert np.asarray(ours).std() > 20, "an empty image proves nothing"
        worst = difference(ours, theirs)
        assert worst <= 1, f"differs by {worst}/255"


def test_four_step_images_equal_diffusers():
    ours, theirs = (
        tiny_models.load_nano("flux-nano-schnell"),
        tiny_models.load_nano_in_diffusers("flux-nano-schnell"),
    )
    how = {"width": 192, "height": 96}
    theirs_only = {"generator": torch.Generator().manual_seed(4), "max_sequence_length": 40}
    expected = theirs(CAR, num_inference_steps=4, **theirs_only, **how).images[0]
    [got] = ours.generate([CAR], [4], num_steps=4, guidance=0.0, progress=False, **how)
    assert np.asarray(got).std() > 20, "an empty image proves nothing"
    assert difference(got, expected) <= 1


# ---- generate


def test_a_seed_is_an_image(nano):
    first, again, other = (nano.generate([DOG], [seed], **QUICK)[0] for seed in (1, 1, 2))
    assert difference(first, again) == 0
    assert difference(first, other) > 50


def test_a_batch_is_its_rows(nano):
    """The same images one by one, up to rounding."""
    together = nano.generate([DOG, CAR, DOG], [1, 2, 3], **QUICK)
    alone = [nano.generate([prompt], [seed], **QUICK)[0] for prompt, seed in ((DOG, 1), (CAR, 2), (DOG, 3))]
    assert max(map(difference, together, alone)) <= 1


def test_each_step_is_reported(nano):
    """In order, from noise on, and the last one holds the image."""
    steps = []
    [image] = nano.generate([DOG], [1], **QUICK, on_step=steps.append)
    levels = nano.schedule(3, 128, 96)
    assert [(step.t, step.t_next) for step in steps] == list(pairwise(levels))
    assert torch.equal(steps[0].noisy, nano.noise([1], 128, 96))
    assert difference(nano.decode(steps[-1].latent, 128, 96)[0], image) == 0


def test_a_second_pass_counts_as_an_evaluation(nano):
    common = {"width": 64, "height": 64, "num_steps": 2, "guidance": 3.5, "progress": False}
    for true_cfg, expected in ((1.0, 4), (2.0, 8)):
        with count_evaluations(nano) as evaluations:
            nano.generate([DOG, DOG], [0, 1], true_cfg=true_cfg, **common)
        assert evaluations() == expected, "two images, two steps"


def test_each_pass_is_reported_while_someone_listens(nano):
    """A listener may stop the run by an error, and none is left behind."""
    rows = []

    def stop(count):
        rows.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), nano.listening(stop):
        nano.generate([DOG, CAR], [1, 2], **QUICK)
    assert rows == [2]
    nano.generate([DOG], [1], **QUICK)
    assert rows == [2]


def test_timings_are_kept(nano):
    nano.generate([DOG], [1], **QUICK)
    assert {"load", "text", "denoise", "decode"} <= nano.timings.keys()
    assert all(seconds > 0 for seconds in nano.timings.values())


def test_a_watermark_is_a_choice(nano):
    from flux.images.io import to_tensor
    from flux.images.watermark import WATERMARK_BITS, extract_watermark

    settings = {**QUICK, "width": 256, "height": 256, "num_steps": 2}
    plain, marked = (nano.generate([DOG], [1], **settings, watermark=mark)[0] for mark in (False, True))
    bits = [
        np.asarray(extract_watermark(to_tensor(image)[None])).ravel().tolist() for image in (plain, marked)
    ]
    assert bits[0] != list(WATERMARK_BITS)
    assert bits[1] == list(WATERMARK_BITS)


def test_a_text_is_one_prompt(nano):
    """Not one for each of its letters."""
    [one], [listed] = nano.generate(DOG, 1, **QUICK), nano.generate([DOG], [1], **QUICK)
    assert difference(one, listed) == 0


@pytest.mark.parametrize(
    ("prompts", "seeds", "steps", "message"),
    [(DOG, 1, 0, "Got 0 steps, expected at least 1"), ([DOG, CAR], [1], 2, "Got 2 prompts and 1 seeds")],
)
def test_no_step_and_no_seed(nano, prompts, seeds, steps, message):
    with pytest.raises(InputError, match=message):
        nano.generate(prompts, seeds, **{**QUICK, "num_steps": steps})


# ---- image-to-image


@pytest.fixture(scope="module")
def photo(nano):
    return nano.generate([CAR], [5], **{**QUICK, "num_steps": 8})[0]


def test_strength_0_is_the_image_again(nano, photo):
    """Only the autoencoder is between: a start image in 0..1 instead of -1..1 would come back washed
    out.
    """
    [same] = nano.generate([DOG], [1], **QUICK, image=photo, strength=0.0)
    error = np.asarray(same, dtype=float) - np.asarray(photo, dtype=float)
    assert abs(error.mean()) < 1
    assert np.sqrt((error**2).mean()) < 10


def test_strength_1_keeps_nothing(nano, photo):
    [with_image], [without] = (nano.generate([DOG], [1], **QUICK, image=image) for image in (photo, None))
    assert difference(with_image, without) == 0


def test_strength_is_the_part_of_the_schedule_that_runs(nano, photo):
    steps = []
    nano.generate([DOG], [1], **{**QUICK, "num_steps": 4}, image=photo, strength=0.5, on_step=steps.append)
    levels = nano.schedule(4, 128, 96)[2:]
    assert [step.t for step in steps] == levels[:-1]
    expected = levels[0] * nano.noise([1], 128, 96) + (1 - levels[0]) * nano.encode(photo)
    assert torch.equal(steps[0].noisy, expected)


def test_each_row_may_start_from_an_image_of_its_own(nano, photo):
    """The same images as one by one, up to rounding."""
    [other] = nano.generate([DOG], [6], **QUICK)
    photos, seeds, how = (photo, other), (1, 2), {**QUICK, "strength": 0.7}
    together = nano.generate([DOG, CAR], seeds, **how, image=photos)
    alone = [
        nano.generate([prompt], [seed], **how, image=start)[0]
        for prompt, seed, start in zip((DOG, CAR), seeds, photos, strict=True)
    ]
    assert max(map(difference, together, alone)) <= 1


def test_encode_is_the_latent_that_decode_takes(nano, photo):
    [again] = nano.decode(nano.encode(photo), *photo.size)
    error = np.asarray(again, dtype=float) - np.asarray(photo, dtype=float)
    assert np.sqrt((error**2).mean()) < 10


# ---- conditions


def test_the_same_text_has_the_same_features(nano):
    """To the last bit, whatever stands beside it: else rows of one prompt would drift apart."""
    cond = nano.condition([DOG, CAR, DOG], 3.5, 3.5, DOG)
    assert torch.equal(cond.txt[0], cond.txt[2])
    assert torch.equal(cond.vec[0], cond.vec[2])
    assert torch.equal(cond.negative.txt, cond.txt[:1].expand(3, -1, -1))
    assert cond.guidance.tolist() == [3.5] * 3
    assert cond.true_cfg == 3.5


def test_no_second_pass_at_guidance_1(nano):
    assert nano.condition([DOG], 3.5).negative is None
    assert nano.condition([DOG], 3.5, 1.0, "a cat").negative is None


# ---- loading


def test_the_former_name():
    from flux import pipeline

    assert pipeline.Pipeline is LoadedModel


def test_a_published_model_by_its_files(monkeypatch, tmp_path):
    """Transformer, autoencoder and text encoders by path; distilled guidance and schnell's lack of it both
    work.
    """
    clip_and_t5 = {"vec_in_dim": 128, "context_in_dim": 256}
    ae = tiny_models.autoencoder()
    save_file(ae.state_dict(), tmp_path / "ae.safetensors")
    for name in ("flux-dev", "flux-schnell"):
        guided = configs[name].params.guidance_embed
        model = tiny_models.flux(guidance_embed=guided, **clip_and_t5)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        spec = tiny_models.replace(configs[name], params=model.params, ae_params=ae.params, clip_length=32)
        monkeypatch.setitem(configs, name, spec)
        settings = ModelSettings(
            model=name,
            weights=str(tmp_path / f"{name}.safetensors"),
            ae_weights=str(tmp_path / "ae.safetensors"),
            text_encoders=str(NANO_FOLDER),
            device="cpu",
            dtype="float32",
            width=64,
            height=48,
            num_steps=2,
        )
        settings = resolve(settings)
        pipe = LoadedModel.load(settings)
        low, high = (
            pipe.generate([DOG], [1], width=64, height=48, num_steps=2, guidance=g, progress=False)[0]
            for g in (1.0, 8.0)
        )
        assert (difference(low, high) > 0) == guided
        cond = pipe.condition([DOG], 1.0)
        assert cond.txt.shape[1] == spec.text_length


def test_a_name_is_enough():
    assert repr(LoadedModel.load("flux-nano")).startswith("<LoadedModel flux-nano, ")


@pytest.fixture
def no_text_encoders(monkeypatch):
    """Loading one is what must not happen."""
    monkeypatch.setattr(OpenModel, "load_text_encoder", lambda *_: pytest.fail("a text encoder was loaded"))


@pytest.mark.parametrize("field", ["weights", "ae_weights", "text_encoders"])
def test_wrong_paths_are_told_before_anything_loads(no_text_encoders, field):
    with pytest.raises(InputError, match="/nowhere"):
        LoadedModel.load(resolve(ModelSettings(device="cpu", **{field: "/nowhere"})))


@pytest.mark.parametrize("field", ["weights", "ae_weights"])
def test_weights_of_another_model_are_told_before_anything_loads(no_text_encoders, tmp_path, field):
    """Names and shapes stand in the file's head: no need to read gigabytes of text encoder first."""
    save_file({"img_in.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"is not this model's|expected an autoencoder"):
        LoadedModel.load(resolve(ModelSettings(device="cpu", **{field: str(tmp_path / "other.safetensors")})))


def test_bfloat16_makes_nearly_the_same_image(nano):
    """Same noise and steps in both; drawn in its own dtype, the noise of a seed would differ."""
    narrow = LoadedModel.load(resolve(ModelSettings(device="cpu", dtype="bfloat16")))
    latent = nano.noise([1], 128, 96)
    images = []
    for pipe in (nano, narrow):
        cond = pipe.condition([DOG], 3.5)
        with pipe.denoising() as model:
            *_, last = sampling.sample(
                model, latent.to(pipe.dtype), pipe.image_ids(1, 128, 96), cond, pipe.schedule(4, 128, 96)
            )
        images += pipe.decode(last.latent, 128, 96)
    error = np.asarray(images[0], dtype=float) - np.asarray(images[1], dtype=float)
    assert np.sqrt((error**2).mean()) < 4


@pytest.mark.parametrize("offload", [True, "model", "blocks", "auto"])
def test_offloading_changes_nothing(nano, offload):
    """On a CPU it moves weights from there to there; the images must not notice, the second one neither."""
    fields = {"device": "cpu", "dtype": "float32", "offload": offload}
    settings = resolve(check_settings(ModelSettings, fields))
    offloaded = LoadedModel.load(settings)
    [a] = nano.generate([DOG], [1], **QUICK)
    for _ in range(2):
        [b] = offloaded.generate([DOG], [1], **QUICK)
        assert difference(a, b) == 0


@pytest.mark.parametrize(
    ("fields", "bound"), [({"t5": "cpu"}, 0), ({"t5": "8bit"}, 6), ({"tiled": True}, 0)], ids=str
)
def test_smaller_forms_make_nearly_the_same_image(nano, fields, bound):
    """Largest difference of a pixel. An image no larger than a tile is one tile."""
    settings = resolve(ModelSettings(device="cpu", dtype="float32", **fields))
    [a], [b] = (pipe.generate([DOG], [1], **QUICK) for pipe in (nano, LoadedModel.load(settings)))
    assert difference(a, b) <= bound


def test_four_bits_come_near(nano):
    settings = resolve(ModelSettings(device="cpu", dtype="float32", quantize="4bit"))
    pipe = LoadedModel.load(settings)
    assert bytes_of(pipe.model) < bytes_of(nano.model) / 4
    cond, ids, errors = nano.condition([DOG], 3.5), nano.image_ids(1, 128, 96), []
    for seed, t in enumerate((0.9, 0.7, 0.5, 0.3)):
        given = (nano.noise([seed], 128, 96), ids, cond, t, t - 0.1)
        exact, packed = (sampling.euler_step(p.model, *given).velocity for p in (nano, pipe))
        errors.append(float((packed - exact).norm() / exact.norm()))
    assert min(errors) > 0
    assert sum(errors) / 4 < 0.25


def bytes_of(model) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def test_progress_says_which_image(nano, capsys):
    nano.generate([DOG], [1], **{**QUICK, "num_steps": 1, "progress": "image 3 of 8"})
    assert "image 3 of 8: 100%" in capsys.readouterr().err
