"""Recorded passes answer like the model itself. Here, a recorded pass is a function that computes again."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.recorded import recomputed, tensors_of

from flux.editing.store import KeptLayers
from flux.inputs import Inputs
from flux.intervention import NOTHING, FreeTokens, Intervention
from flux.runtime import graphs
from flux.runtime.graphs import Answer, GraphedModel


@pytest.fixture
def model():
    return tiny_models.flux()


@pytest.fixture
def recorded():
    """The answers that were recorded."""
    return []


@pytest.fixture
def graphed(model, recorded):
    def record(compute):
        recorded.append(compute)
        return recomputed(compute)

    graphed = GraphedModel(model, record)
    graphed.begin()
    return graphed


def assert_same(answer: Answer, expected: Answer) -> None:
    for x, y in zip(tensors_of(answer), tensors_of(expected), strict=True):
        assert torch.equal(x, y)


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


EVERY = frozenset(range(tiny_models.NUM_LAYERS))
FREE = torch.arange(16) % 3 == 0


def kept_by(model, seed: int, rows: int = 1) -> dict:
    """Keys and values of all layers of another pass."""
    inputs, mods = given(model, 100 + seed, rows)
    return model.observe(inputs, Intervention(keep=EVERY), mods=mods)[1].kept


def chosen(kept: dict, *layers: int) -> dict:
    return {layer: kept[layer] for layer in layers}


CHANGES: dict[str, Callable[[dict, int], Intervention]] = {
    "keeps": lambda _kept, _seed: Intervention(keep=frozenset((1, 4)), keep_queries=frozenset((4,))),
    "injects": lambda kept, _seed: Intervention(inject=chosen(kept, 0, 4)),
    "injects values": lambda kept, _seed: Intervention(inject={4: (None, kept[4][1])}),
    "injects by token": lambda kept, seed: Intervention(
        inject=chosen(kept, 4),
        inject_weights={4: torch.rand(1, 16, generator=torch.Generator().manual_seed(seed))},
    ),
    "sparse": lambda kept, seed: Intervention(free=replace(FreeTokens.of(FREE.roll(3 * seed)), kv=kept)),
    "sparse and injects": lambda kept, _seed: Intervention(
        inject=chosen(kept, 4), free=replace(FreeTokens.of(FREE), kv=kept)
    ),
    "sparse, rounded": lambda kept, _seed: Intervention(
        free=replace(FreeTokens.of(FREE), kv=KeptLayers.of(kept, frozenset((4,))))
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_passes_with_an_intervention_are_recorded(model, graphed, recorded, name):
    """The same layers with other numbers, from the next step of a reference, are one recording."""
    answers = []
    for seed in range(3):
        inputs, mods = given(model, seed)
        change = CHANGES[name](kept_by(model, seed), seed)
        answers.append(graphed.observe(inputs, change, mods=mods))
        assert_same(answers[-1], model.observe(inputs, change, mods=mods))
    assert len(recorded) == 1
    assert not torch.equal(answers[0][0], answers[1][0])


@torch.no_grad()
def test_what_is_kept_stays_when_the_next_pass_is_computed(model, graphed):
    keep = CHANGES["keeps"]({}, 0)
    answers = [
        graphed.observe(inputs, keep, mods=mods) for inputs, mods in (given(model, n) for n in range(3))
    ]
    for seed, answer in enumerate(answers):
        inputs, mods = given(model, seed)
        assert_same(answer, model.observe(inputs, keep, mods=mods))


@torch.no_grad()
def test_other_interventions_are_recorded_anew(model, graphed, recorded):
    kept, (inputs, mods), weights = kept_by(model, 0), given(model, 0), torch.linspace(0, 1, 16)[None]
    changes = [
        NOTHING,
        Intervention(keep=frozenset((1,))),
        Intervention(keep=frozenset((2,))),
        Intervention(inject=chosen(kept, 1)),
        Intervention(inject=chosen(kept, 2)),
        Intervention(inject={2: (kept[2][0], None)}),
        *(Intervention(inject=chosen(kept, 2), inject_weights={2: x}) for x in (weights, weights > 0.5)),
        Intervention(free=replace(FreeTokens.of(FREE), kv=kept)),
        Intervention(free=replace(FreeTokens.of(~FREE), kv=kept)),
    ]
    for count, change in enumerate(changes, 1):
        assert_same(graphed.observe(inputs, change, mods=mods), model.observe(inputs, change, mods=mods))
        assert len(recorded) == count


@torch.no_grad()
def test_a_run_of_many_kinds_of_passes_records_the_first_of_them(model, graphed, recorded, monkeypatch):
    """Otherwise each step would record each pass anew. The next run forgets what it does not need."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    inputs, mods = given(model, 0)
    passes = [Intervention(keep=frozenset((layer,))) for layer in range(3)]
    for change in (*passes, *passes):
        assert_same(graphed.observe(inputs, change, mods=mods), model.observe(inputs, change, mods=mods))
    assert len(recorded) == 2
    graphed.begin()
    for change in (passes[2], passes[1], passes[2]):
        graphed.observe(inputs, change, mods=mods)
    assert len(recorded) == 3
    assert len(graphed.passes) == 2


@torch.no_grad()
def test_all_else_is_computed_by_the_model(model, graphed, recorded, monkeypatch):
    inputs, mods = given(model, 0)
    kept, layer = kept_by(model, 0), frozenset((1,))
    graphed.observe(inputs)
    graphed.observe(inputs, mods=mods, start=model.streams(inputs, mods)[2])
    for rare in (Intervention(skip=layer), Intervention(watch=layer)):
        graphed.observe(inputs, rare, mods=mods)
    half = Intervention(inject=chosen(kept, 1), inject_weights={1: 0.5})
    assert_same(graphed.observe(inputs, half, mods=mods), model.observe(inputs, half, mods=mods))
    monkeypatch.setattr(graphs, "MOST_TOKENS", sum(inputs.counts) - 1)
    graphed.observe(inputs, mods=mods)
    assert not recorded
    graphed.observe(inputs, Intervention(free=replace(FreeTokens.of(FREE), kv=kept)), mods=mods)
    assert len(recorded) == 1, "a sparse step has fewer tokens"


@torch.no_grad()
def test_weights_at_other_places_are_recorded_anew(model, graphed, recorded):
    inputs, mods = given(model, 0)
    for _ in range(2):
        graphed.begin()
        graphed.observe(inputs, mods=mods)
    assert len(recorded) == 1
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()}, assign=True)
    graphed.begin()
    assert torch.equal(graphed.observe(inputs, mods=mods)[0], model.observe(inputs, mods=mods)[0])
    assert len(recorded) == 2


@torch.no_grad()
def test_a_pass_that_cannot_be_recorded_is_computed(model):
    """As where a layer waits for the GPU. That is told once, and not tried again."""
    tried = []

    def record(compute):
        tried.append(compute)
        raise RuntimeError("operation not permitted when stream is capturing")

    inputs, mods = given(model, 0)
    graphed = GraphedModel(model, record)
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
    graphed = GraphedModel(model, recomputed)
    graphed.observe(inputs, mods=mods)
    passes = graphed.passes
    del graphed
    assert not passes


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["plain", *CHANGES])
def test_on_a_gpu(name, compiled):
    device = torch.device("cuda")
    model = tiny_models.flux().to(device)
    cpu = tiny_models.flux()
    if compiled:
        model.compile_blocks()
    graphed = GraphedModel(model)
    graphed.begin()
    for seed in range(3):
        inputs = given(cpu, seed)[0].map(lambda x: x.to(device))
        mods = model.modulations(inputs.timesteps, inputs.y, inputs.guidance)
        change = NOTHING if name == "plain" else CHANGES[name](kept_by(cpu, seed), seed)
        change = change.map(lambda x: x.to(device))
        assert_same(graphed.observe(inputs, change, mods=mods), model.observe(inputs, change, mods=mods))
    assert len(graphed.passes) == 1
