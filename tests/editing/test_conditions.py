"""Edits of a reference that an image steers: every kind of edit, each as alone."""

import pytest
import torch
from helpers.editing import DOG, EDITS, difference, half_mask, make

WAYS = {
    "injection": {},
    "automatic masks": {"dose": "auto"},
    "a painted mask": {"mask": half_mask(), "sparse": True},
}
GUIDANCE = {"noising": 1.5, "euler": 1.0, "none": 1.5}
"""That of a photograph's own passes, by the inversion. "none" is FlowEdit."""


@torch.inference_mode()
@pytest.mark.parametrize("name", WAYS)
def test_edits_come_out_as_alone(steered, small, name):
    together = make(steered, batch_size=3, **WAYS[name])
    for number, prompt in enumerate(EDITS):
        alone = make(steered, edits=[prompt], **WAYS[name])
        assert difference(alone.edits[0], together.edits[number]) <= 1
        assert difference(alone.reference, together.reference) == 0
    assert difference(together.reference, make(small).reference) > 20, "the condition does nothing"


@torch.inference_mode()
@pytest.mark.parametrize("inversion", GUIDANCE)
def test_a_photograph_with_its_own_prompt_comes_back(steered, photo, inversion):
    """What the edit asks for is what is there: every step is the reference's."""
    options = {"inversion": inversion, "guidance": GUIDANCE[inversion], "true_cfg": 1.0}
    made = make(steered, photo, edits=[DOG], **options)
    assert difference(made.edits[0], made.reference) <= 1
