"""The small inventions of training, each against an independent definition."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flux.model import Flux
from flux.sampling import get_schedule, image_ids
from flux.weights.load import read_weights
from training.loop.data import positions
from training.loop.models import TOY, build_autoencoder, build_flux
from training.loop.optimizer import Muon, orthogonalized
from training.loop.trainer import Schedule
from training.scenes.compose import compose
from training.scenes.content import sample_content
from training.scenes.labels import labels_of
from training.scenes.vocabulary import COLOUR_NAMES, INDEX
from training.stages.autoencoder import fold_scale
from training.stages.export import scaled_fp8
from training.stages.flow import noise_levels, noised, shift_for, without_guidance
from training.stages.schnell import LEVELS, add_lora, lora_weights, merged


def randomized(flux: Flux) -> Flux:
    for parameter in flux.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flux.requires_grad_(False)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "img": torch.randn(batch, 4, 64),
        "img_ids": image_ids(batch, 32, 32, "cpu"),
        "txt": torch.randn(batch, 5, TOY.flux.context_in_dim),
        "txt_ids": torch.zeros(batch, 5, 3),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, TOY.flux.vec_in_dim),
    }


def test_a_new_transformer_is_the_zero_function():
    with torch.no_grad():
        assert build_flux(TOY.flux)(**inputs()).abs().max() == 0


def test_folding_the_scale_keeps_the_pictures():
    """Latents come out at unit normal; away from the borders, where padding differs, nothing else changes."""
    params = replace(TOY.ae, num_groups=4)
    ae = build_autoencoder(params).requires_grad_(False)
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    before = ae.encoder(images)
    mean, spread = before.chunk(2, dim=1)[0].mean().item(), before.chunk(2, dim=1)[0].std().item()
    stem = ae.decoder.conv_in(before.chunk(2, dim=1)[0])
    fold_scale(dict(ae.named_parameters()), mean, spread, ae.scale_factor, ae.shift_factor)
    after, log_variance = ae.encoder(images).chunk(2, dim=1)
    unit = ae.scale_factor * (after - ae.shift_factor)
    assert unit.mean().item() == pytest.approx(0, abs=1e-4)
    assert unit.std().item() == pytest.approx(1, abs=1e-4)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(ae.decoder.conv_in(after)[inner], stem[inner], atol=1e-4, rtol=1e-4)
    ratio = 2 * math.log(spread * ae.scale_factor)
    torch.testing.assert_close(log_variance, before.chunk(2, dim=1)[1] - ratio, atol=1e-4, rtol=1e-4)


def test_guidance_folds_into_a_bias():
    guided = randomized(Flux(replace(TOY.flux, guidance_embed=True)))
    plain = Flux(TOY.flux)
    plain.load_state_dict(without_guidance(guided.state_dict(), scale=3.5))
    given = inputs()
    torch.testing.assert_close(
        plain(**given), guided(**given, guidance=torch.full((2,), 3.5)), atol=1e-5, rtol=1e-5
    )


def test_a_merged_difference_equals_the_student():
    base = randomized(Flux(TOY.flux))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    student = add_lora(base, rank=4)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    whole = Flux(TOY.flux)
    whole.load_state_dict(merged(weights, lora_weights(student.state_dict(), weights)))
    given = inputs()
    torch.testing.assert_close(whole(**given), student(**given), atol=1e-4, rtol=1e-4)


def test_only_the_difference_learns():
    student = add_lora(build_flux(TOY.flux), rank=4)
    names = {name.rpartition(".")[2] for name, p in student.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "bias"}


def test_schnell_levels_are_its_own_schedule():
    assert list(LEVELS) == get_schedule(4, 256, shift=False)


def test_scaled_fp8_reads_back(tmp_path):
    from safetensors.torch import save_file

    weights = {"a.weight": torch.randn(64, 48) * 0.02, "a.bias": torch.randn(64)}
    save_file(scaled_fp8(weights), tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors", "cpu", torch.float32)
    assert read.keys() == weights.keys()
    error = (read["a.weight"] - weights["a.weight"]).norm() / weights["a.weight"].norm()
    assert error < 0.04
    torch.testing.assert_close(read["a.bias"], weights["a.bias"], atol=2e-3, rtol=1e-3)


def test_orthogonalized_matrices_have_like_singular_values():
    for shape in ((3, 16, 40), (3, 40, 16)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.5


def test_muon_moves_each_matrix_as_if_it_were_alone():
    """Matrices of one shape are stepped together."""
    start, gradients = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    together = [torch.nn.Parameter(x.clone()) for x in start]
    alone = [torch.nn.Parameter(x.clone()) for x in start]
    for group in (together, alone):
        for parameter, gradient in zip(group, gradients):
            parameter.grad = gradient.clone()
    Muon(together, 0.1).step()
    for parameter in alone:
        Muon([parameter], 0.1).step()
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
        assert not torch.equal(one, start[0])


def test_learning_rate_over_a_stage():
    schedule = Schedule(seconds=100, decay=0.5)
    assert schedule.factor(0, 0) < 0.01
    assert schedule.factor(1000, 40) == 1
    assert schedule.factor(1000, 75) == pytest.approx(0.5)
    assert schedule.factor(1000, 100) == pytest.approx(0.01)


def test_noise_levels_follow_the_samplers_shift():
    t = noise_levels(20_000, shift_for(256), torch.device("cpu"))
    assert t.min() > 0
    assert t.max() < 1
    middle = get_schedule(2, 256)[1]
    assert t.median().item() == pytest.approx(middle, abs=0.01)
    assert shift_for(128) == 1


def test_noised_is_a_straight_line():
    latents, t = torch.randn(3, 4, 64), torch.tensor([0.0, 0.5, 1.0])
    x, velocity = noised(latents, t)
    torch.testing.assert_close(x - t[:, None, None] * velocity, latents)


def test_small_pictures_use_the_large_ones_positions():
    device = torch.device("cpu")
    torch.testing.assert_close(positions(64, 64, device), image_ids(1, 64, 64, device))
    small = positions(32, 32, device, like=(64, 64))
    assert small[0, :, 1].unique().tolist() == [0.5, 2.5]


def test_labels_say_what_the_row_says():
    import random

    rng = random.Random(0)
    scenes = [compose(rng, sample_content(rng)) for _ in range(200)]
    labels = labels_of(torch.tensor([scene.row() for scene in scenes]))
    for number, scene in enumerate(scenes):
        content = scene.content
        names = {subject.name for subject in content.subjects} | {s.hat for s in content.subjects if s.hat}
        assert labels.objects[number].nonzero()[:, 0].tolist() == sorted(INDEX[name] for name in names)
        colours = {COLOUR_NAMES.index(s.colour) for s in content.subjects if s.colour}
        assert set(labels.colours[number].nonzero()[:, 0].tolist()) == colours
        assert labels.count[number] + 1 == len(scene.things)
        first = content.subjects[0]
        if content.kind == "one":
            assert labels.x[number, INDEX[first.name]] == pytest.approx(scene.things[0].x, abs=1e-6)
    assert F.one_hot(labels.place).shape[1] <= 16


def test_nothing_to_begin_with_is_told_in_a_line(monkeypatch, capsys, tmp_path):
    from training.__main__ import parse

    monkeypatch.setattr("sys.argv", ["training", "text", "--begin", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert f"no exported files in {tmp_path}" in capsys.readouterr().err
