"""Noise, packing, schedule and Euler steps, against diffusers' helpers and integrals in closed form."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from helpers import tiny_models
from helpers.fields import IDS, LATENT, NO_TEXT, Field, conditioning
from torch.testing import assert_close

from flux import sampling
from flux.errors import InputError
from flux.intervention import NOTHING, Intervention
from flux.model import Inputs
from flux.sampling import Conditioning, Step

SIZES = [(64, 64), (48, 80), (1024, 1024), (720, 1072)]
VITAL = frozenset({1, 4})
# Base and largest shift: the published models', and others that no default can stand for. Schnell has none.
SHIFTS = [(0.5, 1.15, True), (0.3, 0.9, True), (0.5, 1.15, False)]


# ---- noise, packing, positions


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_noise_packing_and_positions_equal_diffusers(height, width):
    """The same seed starts the same image in both."""
    noise = sampling.get_noise(2, height, width, "cpu", torch.float32, seed=3)
    rows, columns = height // 8, width // 8
    expected = randn_tensor((2, 16, rows, columns), torch.Generator().manual_seed(3), dtype=torch.float32)
    assert torch.equal(noise, expected)

    packed = sampling.pack(noise)
    assert torch.equal(packed, FluxPipeline._pack_latents(noise, 2, 16, rows, columns))
    assert torch.equal(sampling.unpack(packed, height, width), noise)
    assert torch.equal(
        sampling.unpack(packed, height, width), FluxPipeline._unpack_latents(packed, height, width, 8)
    )

    ids = sampling.image_ids(2, height, width, "cpu")
    expected = FluxPipeline._prepare_latent_image_ids(2, rows // 2, columns // 2, "cpu", torch.float32)
    assert torch.equal(ids, expected.expand(2, -1, -1))


def test_noise_in_bfloat16_is_drawn_in_bfloat16():
    """As upstream draws it; rounding float32 noise would give other images for the same seed."""
    noise = sampling.get_noise(1, 64, 64, "cpu", torch.bfloat16, seed=3)
    expected = torch.randn(1, 16, 8, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise, expected)


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    sampling.get_noise(1, 64, 64, "cpu", torch.float32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_between_tokens_round_up():
    """1080 is no multiple of 16; upstream's helpers make 68 rows of tokens of it, and unpack the same."""
    noise = sampling.get_noise(1, 1080, 16, "cpu", torch.float32, seed=0)
    assert noise.shape == (1, 16, 136, 2)
    assert torch.equal(sampling.unpack(sampling.pack(noise), 1080, 16), noise)
    assert sampling.image_ids(1, 1080, 16, "cpu").shape == (1, 68, 3)


def test_prepare_makes_all_that_denoise_needs():
    """Upstream's call: the batch comes from the latent, or from the prompts where there are more of them."""

    def t5(prompts):
        return torch.arange(len(prompts)).float()[:, None, None].expand(-1, 7, 4)

    def clip(prompts):
        return torch.arange(len(prompts)).float()[:, None].expand(-1, 3)

    noise = sampling.get_noise(1, 48, 80, "cpu", torch.float32, seed=0)
    one = sampling.prepare(t5, clip, noise, "a dog")
    shapes = {
        "img": (1, 15, 64),
        "img_ids": (1, 15, 3),
        "txt": (1, 7, 4),
        "txt_ids": (1, 7, 3),
        "vec": (1, 3),
    }
    assert {name: tuple(x.shape) for name, x in one.items()} == shapes
    assert torch.equal(one["img"], sampling.pack(noise))
    assert not one["txt_ids"].any()

    two = sampling.prepare(t5, clip, noise, ["a dog", "a cat"])
    assert {name: tuple(x.shape) for name, x in two.items()} == {k: (2, *v[1:]) for k, v in shapes.items()}
    assert torch.equal(two["img"][0], two["img"][1])
    assert two["vec"][1, 0] == 1

    for prompt in ("a dog", ["a dog"]):
        same = sampling.prepare(t5, clip, noise.expand(3, -1, -1, -1), prompt)
        assert {len(x) for x in same.values()} == {3}


# ---- schedule


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("base", "most", "shifted"), SHIFTS)
def test_schedule_equals_diffusers(base, most, shifted, height, width, steps):
    tokens = height * width // 256
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shifted, shift=1.0)
    mu = calculate_shift(tokens, base_shift=base, max_shift=most)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    levels = sampling.get_schedule(steps, tokens, base, most, shifted)
    assert_close(torch.tensor(levels), scheduler.sigmas, rtol=0, atol=3e-7)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert all(isinstance(t, float) for t in levels)


def test_defaults_are_upstreams():
    assert inspect.signature(sampling.denoise).parameters["guidance"].default == 4.0
    assert sampling.get_schedule(4, 256)[2] == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1), abs=1e-6)
    assert sampling.get_schedule(4, 4096)[2] == pytest.approx(math.exp(1.15) / (math.exp(1.15) + 1), abs=1e-6)
    assert sampling.get_schedule(4, 4096, shift=False) == [1, 0.75, 0.5, 0.25, 0]
    assert sampling.get_lin_function()(2176) == pytest.approx((0.5 + 1.15) / 2)


# ---- Euler steps


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_euler_is_exact_on_a_constant_field(steps):
    """From noise to noise - velocity over the whole schedule, however it is cut: catches steps of a wrong
    length or sign, and a first or last step lost.
    """
    field = Field(lambda x, t, txt: torch.full_like(x, 0.7))
    levels = sampling.get_schedule(steps, 1024)
    steps_taken = list(sampling.sample(field, LATENT, IDS, NO_TEXT, levels))
    assert len(steps_taken) == len(field.asked) == steps
    assert_close(steps_taken[-1].latent, LATENT - 0.7, rtol=0, atol=2e-6)
    for step in steps_taken:
        assert_close(step.clean, LATENT - 0.7, rtol=0, atol=2e-6)


def test_the_model_is_asked_at_the_noisier_end_of_each_step():
    field = Field(lambda x, t, txt: torch.zeros_like(x))
    levels = sampling.get_schedule(4, 1024)
    assert list(sampling.sample(field, LATENT, IDS, NO_TEXT, levels))[-1].t_next == 0
    assert [asked.t.item() for asked in field.asked] == pytest.approx(levels[:-1])


def test_euler_converges_to_the_integral():
    """dx/dt = x ends at x / e; the error halves with twice the steps."""
    field = Field(lambda x, t, txt: x)
    errors = []
    for steps in (100, 200):
        levels = sampling.get_schedule(steps, 1024, shift=False)
        end = list(sampling.sample(field, LATENT, IDS, NO_TEXT, levels))[-1].latent
        errors.append((end - LATENT / math.e).abs().max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_denoise_is_the_last_latent_of_sample():
    """Upstream's call, with upstream's names of arguments."""
    model, given = tiny_models.flux(), tiny_models.inputs(2)
    arguments = {
        "img": given["img"],
        "img_ids": given["img_ids"],
        "txt": given["txt"],
        "txt_ids": given["txt_ids"],
    }
    levels = sampling.get_schedule(3, 16)
    got = sampling.denoise(model, **arguments, vec=given["y"], timesteps=levels, guidance=2.5)
    x = given["img"]
    for t, t_next in pairwise(levels):
        rows = {"timesteps": torch.full((2,), t), "guidance": torch.full((2,), 2.5)}
        x = x + (t_next - t) * model(**{**given, "img": x, **rows})
    # One product makes the modulations of all steps there, and rounds otherwise than one for each.
    assert_close(got, x, rtol=0, atol=2e-6)


def test_a_step_knows_its_latents():
    step = Step(0.8, 0.6, LATENT, torch.ones_like(LATENT))
    assert_close(step.latent, LATENT - 0.2, rtol=0, atol=1e-6)
    assert_close(step.clean, LATENT - 0.8, rtol=0, atol=1e-6)


# ---- interventions over the steps


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def row():
    return tiny_models.inputs(1, 32, 48)


LEVELS = sampling.get_schedule(5, 6, shift=False)


def test_one_intervention_serves_all_steps(model, row):
    skip = Intervention(skip=frozenset({2}))
    ends = [
        list(sampling.sample(model, row["img"], row["img_ids"], conditioning(row), LEVELS, given))[-1].latent
        for given in (skip, [skip] * 5)
    ]
    assert torch.equal(*ends)


def test_steps_outside_a_window_are_plain(model, row):
    skip = Intervention(skip=frozenset({2}))
    inside = sampling.window(5, 0.2, 0.6)
    assert list(inside) == [1, 2]
    x = row["img"]
    given = [skip if index in inside else NOTHING for index in range(5)]
    cond = conditioning(row).scheduled(model, LEVELS[:-1])
    steps = sampling.sample(model, x, row["img_ids"], cond, LEVELS, given)
    for index, (step, t, t_next) in enumerate(zip(steps, LEVELS, LEVELS[1:])):
        own = skip if index in (1, 2) else NOTHING
        rows = {**row, "img": x, "timesteps": torch.tensor([t])}
        x = x + (t_next - t) * model.observe(Inputs(**rows), own, mods=cond.modulations.at(t))[0]
        assert torch.equal(step.latent, x)


def test_edits_beside_their_reference(model, row):
    """The interventions of one sampling come from another that runs beside it, each asked for when its step
    begins; it equals both in one batch with the reference's keys and values written over by rows.
    """
    reference, edit, order = conditioning(row), conditioning(row, seed=1), []

    def injecting():
        keep = Intervention(keep=VITAL)
        for step in sampling.sample(model, row["img"], row["img_ids"], reference, LEVELS, keep):
            order.append(("reference", step.t))
            yield step.kept.map(lambda kept: Intervention(inject=kept))

    latents = []
    for step in sampling.sample(model, row["img"], row["img_ids"], edit, LEVELS, injecting()):
        order.append(("edit", step.t))
        latents.append(step.latent)
    assert order == [(who, t) for t in LEVELS[:-1] for who in ("reference", "edit")]

    both = {name: torch.cat((x, x)) for name, x in row.items()} | {
        "txt": torch.cat((reference.txt, edit.txt))
    }
    for latent, t, t_next in zip(latents, LEVELS, LEVELS[1:]):
        both["timesteps"] = torch.full((2,), t)
        both["img"] = both["img"] + (t_next - t) * tiny_models.hand_forward(model, both, inject=VITAL)
        assert_close(latent, both["img"][1:], rtol=0, atol=2e-5)


def test_too_few_interventions_are_refused(model, row):
    """Three for five steps: without an error, the image would stay half denoised."""
    with pytest.raises(ValueError, match="give one for each"):
        list(sampling.sample(model, row["img"], row["img_ids"], conditioning(row), LEVELS, [NOTHING] * 3))


# ---- windows


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize("cut", [0.2, 0.4, 0.5])
def test_windows_that_meet_cover_each_step_once(steps, cut):
    meeting = sampling.step_at(cut, steps)
    parts = [(0.0, cut)] * (meeting > 0) + [(cut, 1.0)] * (meeting < steps)
    assert len(parts) == 2 or steps == 1
    assert [step for part in parts for step in sampling.window(steps, *part)] == list(range(steps))


def test_window_of_all_steps_and_of_forty_percent():
    assert sampling.window(20, 0, 1) == range(20)
    assert sampling.window(20, 0, 0.4) == range(8)
    assert sampling.window(15, 0.4, 1) == range(6, 15)


def test_half_a_step_counts():
    """So that a quarter of two steps is one, of ten three."""
    assert [len(sampling.window(steps, 0, 0.25)) for steps in (2, 4, 10, 20)] == [1, 1, 3, 5]
    assert sampling.step_at(0.25, 10) == 3


def test_a_window_without_steps_is_refused():
    with pytest.raises(
        InputError, match=r"4 steps, none of which lies in 0\.\.0\.1 of them, .* num_steps 5 or"
    ):
        sampling.window(4, 0.0, 0.1)
    with pytest.raises(InputError, match=r"^Got 1 step, none .* this dose injects .* num_steps 2 or more"):
        sampling.window(1, 0.0, 0.25)
    with pytest.raises(
        InputError, match=r"inject_from 0\.5 and inject_until 0\.4, expected inject_from to be sm"
    ):
        sampling.window(20, 0.5, 0.4)


def test_a_schedule_works_its_modulations_out_once(model, monkeypatch):
    """Rows alike share one row of them; rows that differ, and a second prompt, have their own."""
    made, own = [], type(model).modulations
    monkeypatch.setattr(
        type(model), "modulations", lambda net, t, *rows: (made.append(len(t)), own(net, t, *rows))[1]
    )
    given = tiny_models.inputs(2, 32, 48)
    cond = Conditioning(given["txt"], given["txt_ids"], given["y"], torch.tensor([3.0, 3.0]))
    alike = replace(cond, vec=given["y"][:1].expand(2, -1))
    for each, rows in ((cond, 2), (alike, 1), (replace(alike, guidance=torch.tensor([3.0, 2.0])), 2)):
        ids = given["img_ids"]
        *_, last = sampling.sample(model, given["img"], ids, each, LEVELS)
        assert made.pop() == rows * (len(LEVELS) - 1)
        assert not made
        latent = given["img"]
        for t, t_next in pairwise(LEVELS):
            latent = sampling.euler_step(model, latent, ids, each, t, t_next).latent
        assert_close(last.latent, latent, rtol=0, atol=1e-5)
    list(sampling.sample(model, given["img"], ids, replace(cond, negative=cond), LEVELS))
    assert not made
