"""Edits of a reference that an image steers: every kind of edit, each as alone."""

import weakref
from dataclasses import replace

import pytest
import torch
from helpers.conditions import CONTEXT
from helpers.editing import DOG, EDITS, STEPS, TOKENS, half_mask, make
from helpers.images import difference

from flux.loaded_model import LoadedModel
from flux.sampling import ContextReuse

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
    """The edit asks for what is there already, so every step is the reference's."""
    options = {"inversion": inversion, "guidance": GUIDANCE[inversion], "true_cfg": 1.0}
    made = make(steered, photo, edits=[DOG], **options)
    assert difference(made.edits[0], made.reference) <= 1


@pytest.fixture
def reusing(steered):
    """`steered`, with two steps for each computation of the context's keys and values."""
    return replace(steered, steering=replace(steered.steering, context_every=2))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["automatic masks", "a painted mask"])
def test_edits_that_reuse_the_context_come_out_as_alone(reusing, steered, name):
    together = make(reusing, batch_size=3, **WAYS[name])
    for number, prompt in enumerate(EDITS[:2]):
        alone = make(reusing, edits=[prompt], **WAYS[name])
        assert difference(alone.edits[0], together.edits[number]) <= 1
        assert difference(alone.reference, together.reference) == 0
    assert difference(together.reference, make(steered).reference) > 5, "nothing is reused"


@torch.inference_mode()
def test_tokens_of_edits_that_reuse_the_context(reusing):
    """Each step computes the reference's tokens, then those of a sparse edit beside it."""
    counts: list[int] = []
    hook = reusing.model.img_in.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    make(reusing, edits=EDITS[:1], mask=half_mask(), sparse=True, true_cfg=1.0)
    hook.remove()
    context = [CONTEXT * (step % 2 == 0) for step in range(STEPS)]
    assert counts == [tokens + more for more in context for tokens in (TOKENS, TOKENS // 2)]


@torch.inference_mode()
def test_an_edit_with_its_references_prompt_is_the_reference(reusing):
    made = make(reusing, edits=[DOG])
    assert difference(made.edits[0], made.reference) <= 1


@torch.inference_mode()
@pytest.mark.parametrize("way", [{"dose": "auto"}, {"mask": half_mask(), "sparse": True}])
def test_nothing_of_the_context_is_kept_while_images_are_decoded(reusing, monkeypatch, way):
    stored, alive, store = [], [], ContextReuse.store

    def noted(context, recorded, number):
        stored.extend(weakref.ref(x) for kv in recorded.context.values() for x in kv)
        store(context, recorded, number)

    def decode(*given):
        alive.append(sum(x() is not None for x in stored))
        return LoadedModel.decode(reusing, *given)

    monkeypatch.setattr(ContextReuse, "store", noted)
    monkeypatch.setattr(reusing, "decode", decode)
    make(reusing, edits=EDITS[:1], **way)
    assert stored
    assert set(alive) == {0}
