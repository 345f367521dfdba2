"""Recorded passes answer like the model itself. Here, a recorded pass is a function that computes again."""

from dataclasses import replace

import pytest
import torch
from helpers import conditions, tiny_models

from flux.inputs import Inputs
from flux.intervention import Intervention
from flux.runtime import graphs
from flux.runtime.graphs import GraphedModel


@pytest.fixture
def model():
    return tiny_models.flux()


@pytest.fixture
def recorded():
    """The answers that were recorded."""
    return []


@pytest.fixture
def graphed(model, recorded):
    def record(answer):
        recorded.append(answer)
        return answer

    return GraphedModel(model, model, record=record)


def given(model, seed: int, batch: int = 1, **size) -> tuple[Inputs, list[torch.Tensor]]:
    """Inputs and their modulations."""
    inputs = Inputs(**tiny_models.inputs(batch, seed=seed, **size))
    return inputs, model.modulations(inputs.timesteps[:1], inputs.y[:1], inputs.guidance[:1])


@torch.no_grad()
def test_other_inputs_of_the_same_shapes_are_not_recorded_again(model, graphed, recorded):
    answers = []
    for seed in range(3):
        inputs, mods = given(model, seed)
        answers.append(graphed.observe(inputs, mods=mods)[0])
        assert torch.equal(answers[-1], model.observe(inputs, mods=mods)[0])
    assert len(recorded) == 1
    assert not torch.equal(answers[0], answers[1])


@torch.no_grad()
def test_an_answer_stays_when_the_next_is_computed(model, graphed):
    first, second = given(model, 0), given(model, 1)
    graphed.observe(first[0], mods=first[1])
    answer = graphed.observe(first[0], mods=first[1])[0]
    before = answer.clone()
    graphed.observe(second[0], mods=second[1])
    assert torch.equal(answer, before)


@torch.no_grad()
def test_other_shapes_and_conditions_are_recorded_anew(model, graphed, recorded):
    inputs, mods = given(model, 0)
    steered = replace(conditions.condition(1, 4), channels=None)
    steered = replace(steered, context=steered.context[..., :64])
    cases = [
        inputs,
        given(model, 0, batch=2)[0],
        given(model, 0, width=48)[0],
        replace(inputs, condition=steered),
        replace(inputs, condition=replace(steered, context_strength=1.5)),
    ]
    for count, case in enumerate(cases, 1):
        assert torch.equal(graphed.observe(case, mods=mods)[0], model.observe(case, mods=mods)[0])
        assert len(recorded) == count
    assert len(graphed.passes) == graphs.MOST_GRAPHS


@torch.no_grad()
def test_all_else_is_computed_by_the_model(model, graphed, recorded, monkeypatch):
    inputs, mods = given(model, 0)
    graphed.observe(inputs)
    graphed.observe(inputs, Intervention(skip=frozenset((1,))), mods=mods)
    graphed.observe(inputs, mods=mods, start=model.streams(inputs, mods)[2])
    kept = graphed.observe(inputs, Intervention(keep=frozenset((1,))), mods=mods)[1].kept
    graphed.observe(inputs, Intervention(inject=kept), mods=mods)
    monkeypatch.setattr(graphs, "MOST_TOKENS", sum(inputs.counts) - 1)
    graphed.observe(inputs, mods=mods)
    assert not recorded
    several = GraphedModel(model, model, 2, record=lambda answer: answer)
    several.observe(inputs, mods=mods)
    assert len(several.passes) == 1, "two GPUs have half of the tokens each"


@torch.no_grad()
def test_weights_at_other_places_are_recorded_anew(model, graphed, recorded):
    inputs, mods = given(model, 0)
    for _ in range(2):
        graphed.check_weights()
        graphed.observe(inputs, mods=mods)
    assert len(recorded) == 1
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()}, assign=True)
    graphed.check_weights()
    assert torch.equal(graphed.observe(inputs, mods=mods)[0], model.observe(inputs, mods=mods)[0])
    assert len(recorded) == 2


@torch.no_grad()
def test_a_pass_that_cannot_be_recorded_is_computed(model):
    """As where a layer waits for the GPU. That is told once, and not tried again."""
    tried = []

    def record(answer):
        tried.append(answer)
        raise RuntimeError("operation not permitted when stream is capturing")

    inputs, mods = given(model, 0)
    graphed = GraphedModel(model, model, record=record)
    with pytest.warns(UserWarning, match="launched one by one"):
        first = graphed.observe(inputs, mods=mods)[0]
    second = graphed.observe(inputs, mods=mods)[0]
    assert torch.equal(first, model.observe(inputs, mods=mods)[0])
    assert torch.equal(second, first)
    assert len(tried) == 1


@torch.no_grad()
def test_an_error_of_the_pass_itself_is_no_matter_of_graphs(model, graphed, recorded):
    inputs, mods = given(model, 0)
    narrow = replace(inputs, txt=inputs.txt[..., 1:])
    for each in (model, graphed):
        with pytest.raises(RuntimeError, match="shapes"):
            each.observe(narrow, mods=mods)
    assert graphed.records
    assert not recorded


@torch.no_grad()
def test_passes_end_with_their_model(model):
    inputs, mods = given(model, 0)
    graphed = GraphedModel(model, model, record=lambda answer: answer)
    graphed.observe(inputs, mods=mods)
    passes = graphed.passes
    del graphed
    assert not passes


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled):
    device = torch.device("cuda")
    model = tiny_models.flux().to(device)
    if compiled:
        model.compile_blocks()
    graphed = GraphedModel(model, model)
    for seed in range(3):
        inputs = Inputs(**tiny_models.inputs(1, seed=seed)).map(lambda x: x.to(device))
        mods = model.modulations(inputs.timesteps, inputs.y, inputs.guidance)
        answer = graphed.observe(inputs, mods=mods)[0]
        torch.testing.assert_close(answer, model.observe(inputs, mods=mods)[0], rtol=0, atol=0)
    assert len(graphed.passes) == 1
