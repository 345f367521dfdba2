"""FlowEdit on fields that are known in closed form."""

import numpy as np
import torch
from helpers.fields import IDS, LATENT, NO_TEXT, Field
from torch.testing import assert_close

from flux import sampling
from flux.editing.flow_edit import FlowEdit
from flux.sampling import Conditioning

LEVELS = sampling.get_schedule(7, 1024)


def told(*values: float) -> Conditioning:
    """Texts that the fields below read as numbers."""
    rows = len(values)
    txt = torch.tensor(values)[:, None, None]
    return Conditioning(txt, NO_TEXT.txt_ids.expand(rows, -1, -1), NO_TEXT.vec.expand(rows, -1))


def noises(count: int = 7) -> list[torch.Tensor]:
    return [torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def test_flow_edit_to_the_same_prompt_changes_nothing():
    field = Field(lambda x, t, txt: torch.sin(x) * txt)
    *_, end = FlowEdit(field, LATENT, IDS, told(2.0), told(2.0), LEVELS, noises()).edits()
    assert torch.equal(end, LATENT)


def test_flow_edit_walks_along_the_difference():
    """A field of the text alone: each edit moves by its difference, times the noise level where it begins."""
    field = Field(lambda x, t, txt: txt * torch.ones_like(x))
    steps = list(FlowEdit(field, LATENT, IDS, told(2.0), told(5.0, 1.0), LEVELS, noises()).edits())
    assert len(steps) == 7
    assert torch.equal(steps[0], LATENT.expand(2, -1, -1))
    begin = LEVELS[1]
    for row, difference in enumerate((3.0, -1.0)):
        assert_close(steps[-1][row : row + 1], LATENT - begin * difference, rtol=0, atol=1e-6)


def test_flow_edit_asks_at_noise_of_its_own():
    """The source between latent and that step's noise; the target as far from there as the edit has come."""
    field, drawn = Field(lambda x, t, txt: txt * torch.ones_like(x)), noises()
    steps = list(FlowEdit(field, LATENT, IDS, told(2.0), told(5.0), LEVELS, drawn).edits())
    for index, (source, target) in enumerate(zip(field.asked[::2], field.asked[1::2]), start=1):
        noisy = (1 - LEVELS[index]) * LATENT + LEVELS[index] * drawn[index]
        assert_close(source.img, noisy, rtol=0, atol=1e-6)
        assert_close(target.img, noisy + steps[index - 1] - LATENT, rtol=0, atol=1e-6)


def test_flow_edit_leaves_what_the_mask_forbids():
    field, mask = Field(lambda x, t, txt: txt * torch.ones_like(x)), torch.zeros(1, 6, 1, dtype=torch.bool)
    mask[:, 2] = True
    *_, end = FlowEdit(field, LATENT, IDS, told(2.0), told(5.0), LEVELS, noises()).edits(mask)
    assert torch.equal(end[:, [0, 1, 3, 4, 5]], LATENT[:, [0, 1, 3, 4, 5]])
    assert (end[:, 2] - LATENT[:, 2]).abs().min() > 1


def test_the_prior_of_decflowedit():
    """Equations 2 to 4 of its paper, on a field whose difference is the token's number at every step."""
    columns, rows = 12, 10
    numbers = torch.arange(float(rows * columns))[None, :, None]
    field = Field(lambda x, t, txt: txt * numbers.expand_as(x))
    latent = torch.zeros(1, rows * columns, 64)
    drawn = [torch.zeros_like(latent)] * 7
    ids = sampling.image_ids(1, 16 * rows, 16 * columns, "cpu")
    prior = FlowEdit(field, latent, ids, told(2.0), told(5.0), LEVELS, drawn).prior(columns)
    # Steps 2 to 5 of 7 lie in 0.25 T to 0.75 T: 1.75 to 5.25.
    energy = (4 * 3.0 * 8 * numbers).view(rows, columns)
    smooth = torch.empty_like(energy)
    for row in range(rows):
        for column in range(columns):
            smooth[row, column] = energy[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].mean()
    low, high = np.percentile(smooth, 10), np.percentile(smooth, 90)
    expected = 1 / (1 + torch.exp(-((smooth - low) / (high - low)).clamp(0, 1).sub(0.55) / 0.08))
    assert_close(prior.view(rows, columns), expected, rtol=1e-4, atol=1e-4)


def test_the_prior_weighs_each_move():
    field, prior = Field(lambda x, t, txt: txt * torch.ones_like(x)), torch.linspace(0, 1, 6)[None, :, None]
    *_, plain = FlowEdit(field, LATENT, IDS, told(2.0), told(5.0), LEVELS, noises()).edits()
    *_, weighed = FlowEdit(field, LATENT, IDS, told(2.0), told(5.0), LEVELS, noises()).edits(prior=prior)
    assert_close(weighed - LATENT, prior * (plain - LATENT), rtol=1e-5, atol=1e-5)
