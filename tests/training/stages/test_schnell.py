"""The four-step student as a low-rank difference."""

import torch
from helpers.training import inputs, randomized

from flux.model import Flux
from flux.sampling import get_schedule
from training.loop.models import TOY, build_flux
from training.stages.schnell import LEVELS, add_lora, lora_weights, merged


def test_a_merged_difference_equals_the_student():
    base = randomized(Flux(TOY.flux))
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    student = add_lora(base, rank=4)
    for parameter in student.parameters():
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
