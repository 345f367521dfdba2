"""Sequence-parallel passes beside plain ones, in two processes and in four.

python parallel_work.py FOLDER     writes 2.json and 4.json: the largest relative error of each case
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flux.inputs import Inputs
from flux.intervention import NOTHING, FreeTokens, Intervention
from flux.model import Flux
from flux.modules.step_cache import StepCache
from flux.runtime.graphs import GraphedModel
from flux.runtime.parallel import ProcessGroup, SequenceParallelFlux
from flux.sampling import Conditioning, euler_step, get_schedule, sample
from helpers import conditions, hopper_stub, tiny_models
from helpers.forks import run_together
from helpers.recorded import recomputed

LAYERS = (1, tiny_models.NUM_DOUBLE - 1, tiny_models.NUM_DOUBLE + 1)
Answers = list[torch.Tensor]
CASES: dict[str, Callable[[Flux | SequenceParallelFlux, dict], Answers]] = {}
FEW = (
    "plain",
    "equal_shares",
    "injected_in_part",
    "free_tokens",
    "recorded_passes",
    "spared_steps",
    "context_scaled_and_hidden",
)
"""Cases for four processes."""


def case(make: Callable) -> Callable:
    CASES[make.__name__] = make
    return make


def share_of(model: Flux | SequenceParallelFlux, whole: torch.Tensor) -> torch.Tensor:
    """This model's share of keys or values of all image tokens, "B H I D"."""
    if isinstance(model, Flux):
        return whole
    return whole.tensor_split(model.group.count, dim=2)[model.group.rank]


def ask(
    model: Flux | SequenceParallelFlux, given: dict, intervention: Intervention = NOTHING, **more
) -> Answers:
    return [model.observe(Inputs(**given), intervention, **more)[0]]


def reference() -> dict:
    return tiny_models.inputs(1, 48, 80, seed=7)


@case
def plain(model, given) -> Answers:
    return ask(model, given)


@case
def with_modulations_ahead(model, given) -> Answers:
    mods = model.modulations(given["timesteps"], given["y"], given["guidance"])
    return ask(model, given, mods=mods)


@case
def layers_skipped(model, given) -> Answers:
    return ask(model, given, Intervention(skip=frozenset(LAYERS)))


@case
def layers_skipped_in_each_row(model, given) -> Answers:
    rows = (frozenset({0, tiny_models.NUM_DOUBLE}), frozenset({1}))
    return ask(model, given, Intervention(skip=rows)) + ask(
        model, given, Intervention(skip=rows, skip_scale=0.3)
    )


@case
def keys_and_values_kept_and_injected(model, given) -> Answers:
    velocity, found = model.observe(Inputs(**reference()), Intervention(keep=frozenset(LAYERS)))
    return [velocity, *ask(model, given, Intervention(inject=found.kept))]


@case
def injected_in_part(model, given) -> Answers:
    """A weight, a weight for each token, keys, values and queries alone."""
    keep = Intervention(keep=frozenset(LAYERS), keep_queries=frozenset(LAYERS))
    kept = model.observe(Inputs(**reference()), keep)[1].kept
    tokens = torch.linspace(0, 1, given["img"].shape[1])[None]
    answers = ask(model, given, Intervention(inject=kept, inject_weights={LAYERS[0]: 0.4, LAYERS[1]: tokens}))
    for part in (0, 1, 2):
        shares = {
            n: tuple(x if i == part else None for i, x in enumerate(parts)) for n, parts in kept.items()
        }
        answers += ask(model, given, Intervention(inject=shares, inject_weights={LAYERS[2]: tokens > 0.5}))
    return answers


@case
def free_tokens(model, given) -> Answers:
    """Few and many of them, in a block and scattered; with all parts injected, wholly and to some degree."""
    every = frozenset(range(tiny_models.NUM_LAYERS))
    keep = Intervention(keep=every, keep_queries=frozenset(LAYERS))
    kept = model.observe(Inputs(**reference()), keep)[1].kept
    vital, answers = {layer: kept[layer] for layer in LAYERS}, []
    tokens = torch.linspace(0, 1, given["img"].shape[1])[None]
    for mask in (tokens[0] < 0.3, tokens[0] > 0.9, torch.arange(15) % 2 == 0):
        free = replace(FreeTokens.of(mask), kv=kept)
        answers += ask(model, given, Intervention(free=free))
        answers += ask(model, given, Intervention(inject=vital, free=free))
        weights = {LAYERS[0]: 0.4, LAYERS[1]: tokens}
        answers += ask(model, given, Intervention(inject=vital, inject_weights=weights, free=free))
    return answers


@case
def recorded_passes(model, given) -> Answers:
    """Each kind of pass twice: recorded, and launched again with other numbers."""
    if not isinstance(model, Flux):
        model = SequenceParallelFlux(model.model, model.group, GraphedModel(model.model, recomputed))
    masks = [FreeTokens.of(torch.arange(15) % 4 == place) for place in (0, 1)]
    answers = []
    for seed in (1, 2):
        first, second = (tiny_models.inputs(1, 48, 80, seed=n) for n in (seed, 10 + seed))
        mods = model.modulations(first["timesteps"], first["y"], first["guidance"])
        keep = Intervention(keep=frozenset(range(tiny_models.NUM_LAYERS)))
        velocity, found = model.observe(Inputs(**first), keep, mods=mods)
        inject = Intervention(inject={layer: found.kept[layer] for layer in LAYERS})
        answers += [velocity, *ask(model, second, mods=mods), *ask(model, second, inject, mods=mods)]
        for free in masks:
            answers += ask(model, second, Intervention(free=replace(free, kv=found.kept)), mods=mods)
    return answers


@case
def what_is_kept_is_a_share(model, given) -> Answers:
    """Kept by the undivided model, cut by hand."""
    keep = Intervention(keep=frozenset(LAYERS))
    whole = (model if isinstance(model, Flux) else model.model).observe(Inputs(**given), keep)[1].kept
    own = model.observe(Inputs(**given), keep)[1].kept
    shares = {n: tuple(share_of(model, x) for x in pair) for n, pair in whole.items()}
    for n, pair in own.items():
        for x, expected in zip(pair, shares[n], strict=True):
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    return ask(model, tiny_models.inputs(2, 48, 80, seed=3), Intervention(inject=shares))


@case
def watched(model, given) -> Answers:
    found = model.observe(Inputs(**given), Intervention(watch=frozenset(LAYERS)))[1]
    return [x for pair in found.watched.values() for x in pair]


def that_takes_conditions(model: Flux | SequenceParallelFlux) -> Flux | SequenceParallelFlux:
    """A model with wider inputs, on as many processes as this one."""
    wider = conditions.model()
    return wider if isinstance(model, Flux) else SequenceParallelFlux(wider, model.group)


@case
def with_a_condition(model, given) -> Answers:
    """Channels, context and text tokens, each sharded by itself: plain, injected, free, watched, started."""
    wider = that_takes_conditions(model)
    whole, every = conditions.condition(2, 15), frozenset(range(tiny_models.NUM_LAYERS))
    source = Inputs(**reference(), condition=whole.at_rows([0]))
    velocity, found = wider.observe(source, Intervention(keep=every, watch=frozenset(LAYERS)))
    watched = [x for pair in found.watched.values() for x in pair]
    inputs = Inputs(**given, condition=whole)
    inject = {layer: found.kept[layer] for layer in LAYERS}
    free = replace(FreeTokens.of(torch.arange(15) % 4 == 0), kv=found.kept)
    changes = NOTHING, Intervention(inject=inject), Intervention(inject=inject, free=free)
    answers = [wider.observe(inputs, change)[0] for change in changes]
    answers += [wider.observe(inputs, start=start)[0] for start in wider.streams(inputs)[1::3]]
    return [velocity, *watched, *answers]


@case
def context_of_another_pass(model, given) -> Answers:
    """Injected in all layers or in some, watched, beside free tokens, with and without a start."""
    wider = that_takes_conditions(model)
    whole, every = conditions.condition(2, 15), frozenset(range(tiny_models.NUM_LAYERS))
    keep = Intervention(keep=every, keep_context=True)
    found = wider.observe(Inputs(**reference(), condition=whole.at_rows([0])), keep)[1]
    inputs, watch = Inputs(**given, condition=whole), frozenset(LAYERS)
    free = replace(FreeTokens.of(torch.arange(15) % 4 == 0), kv=found.kept)
    some = {layer: found.context[layer] for layer in LAYERS}
    changes = [
        Intervention(inject_context=kv, free=each) for kv in (found.context, some) for each in (None, free)
    ]
    answers = [wider.observe(inputs, change)[0] for change in changes]
    start = wider.streams(inputs)[2]
    answers += [wider.observe(inputs, change, start=start)[0] for change in changes[::2]]
    watched = wider.observe(inputs, replace(changes[0], watch=watch))[1].watched
    return answers + [x for pair in watched.values() for x in pair]


@case
def context_scaled_and_hidden(model, given) -> Answers:
    """Scaled about the mean of all processes' keys; computed or of another pass, beside free tokens."""
    wider, hidden = that_takes_conditions(model), frozenset({1, 2, 4})
    whole, every = conditions.condition(2, 15, context_strength=1.7), frozenset(range(tiny_models.NUM_LAYERS))
    keep = Intervention(keep=every, keep_context=True, hide_context=hidden)
    source = Inputs(**reference(), condition=whole.at_rows([0]))
    velocity, found = wider.observe(source, keep)
    answers, inputs = [velocity], Inputs(**given, condition=whole)
    free = replace(FreeTokens.of(torch.arange(15) % 4 == 0), kv=found.kept)
    some = {layer: found.context[layer] for layer in LAYERS}
    for each, kv, layers in product((None, free), ({}, some, found.context), (frozenset(), hidden)):
        change = Intervention(hide_context=layers, inject_context=kv, free=each)
        answers += [wider.observe(inputs, change)[0]]
    return answers + [wider.observe(inputs, start=start)[0] for start in wider.streams(inputs)[1::3]]


@case
def equal_shares(model, given) -> Answers:
    return ask(model, tiny_models.inputs(2, 64, 64, num_txt=4))


@case
def streams_to_start_with(model, given) -> Answers:
    """Each process starts with its own share of them."""
    streams = model.streams(Inputs(**given))
    return [answer for start in streams[::2] for answer in ask(model, given, start=start)]


@case
def fewer_tokens_than_processes(model, given) -> Answers:
    return ask(model, tiny_models.inputs(2, 16, 16, num_txt=1))


def conditioning(given: dict, **more) -> Conditioning:
    return Conditioning(given["txt"], given["txt_ids"], given["y"], given["guidance"], **more)


@case
def true_guidance(model, given) -> Answers:
    """A reference and edits that inject from it, with thresholding."""
    own, other = reference(), tiny_models.inputs(1, 48, 80, seed=9)
    source = conditioning(own, negative=conditioning(other), true_cfg=3.0)
    keep = Intervention(keep=frozenset(LAYERS))
    kept = euler_step(model, own["img"], own["img_ids"], source, 0.8, 0.6, keep)
    inject = kept.kept.map(lambda kv: Intervention(inject=kv))
    negative = conditioning(tiny_models.inputs(2, 48, 80, seed=5))
    cond = conditioning(given, negative=negative, true_cfg=3.0, mimic_scale=1.5, mimic_percentile=0.9)
    step = euler_step(model, given["img"], given["img_ids"], cond, 0.8, 0.6, inject)
    return [kept.velocity, step.velocity]


@case
def spared_steps(model, given) -> Answers:
    """The same steps are spared, in all processes."""
    group = model.group if isinstance(model, SequenceParallelFlux) else ProcessGroup()
    cache, levels = StepCache(0.7, group.total), get_schedule(12, 15)
    steps = sample(model, given["img"], given["img_ids"], conditioning(given), levels, cache=cache)
    answers = [step.latent for step in steps]
    assert cache.full
    assert cache.reused
    return [*answers, torch.tensor([cache.full, cache.reused])]


@case
def hopper_blocks(model, given) -> Answers:
    """The kernels' arithmetic, where the exchange has a matmul to hide behind."""
    if isinstance(model, Flux):
        return ask(model, given)
    with pytest.MonkeyPatch.context() as patch:
        hopper_stub.install(patch)
        from flux.modules import projections_hopper

        patch.setattr(projections_hopper, "has_kernel", lambda x: True)
        fast = tiny_models.flux()
        for block in fast.blocks:
            projections_hopper.use_hopper(block)
        return ask(SequenceParallelFlux(fast, model.group), given)


@case
def compiled_blocks(model, given) -> Answers:
    """One graph each: a break would be an error."""
    context = conditions.condition(2, 15, channels=None, context_strength=1.7)
    context = replace(context, context=context.context[..., :64])
    hide = Intervention(hide_context=frozenset({0, 1}))
    small = tiny_models.flux(depth=1, depth_single_blocks=1)
    if not isinstance(model, Flux):
        for block in small.blocks:
            block.compile(fullgraph=True, backend="eager")
        small = SequenceParallelFlux(small, model.group)
    return ask(small, given) + ask(small, given | {"condition": context}, hide)


def compare(make: Callable, undivided: Flux, group: ProcessGroup) -> float:
    """The largest relative difference, of all processes; infinite where these differ among themselves."""
    given = tiny_models.inputs(2, 48, 80)
    answers, error = make(SequenceParallelFlux(undivided, group), given), 0.0
    for got, expected in zip(answers, make(undivided, given), strict=True):
        first = got.clone()
        dist.broadcast(first, 0)
        error = max(
            error, tiny_models.relative_error(got, expected) if torch.equal(first, got) else float("inf")
        )
    worst = torch.tensor(error)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


@torch.inference_mode()
def compare_all(names: Iterable[str], file: Path) -> None:
    """The work of one of the processes, of which the first one writes the errors."""
    dist.init_process_group("gloo")
    group = ProcessGroup(dist.get_rank(), dist.get_world_size())
    undivided = tiny_models.flux()
    errors = {name: compare(CASES[name], undivided, group) for name in names}
    if group.rank == 0:
        file.write_text(json.dumps(errors))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for count, names in ((2, CASES), (4, FEW)):
        run_together(partial(compare_all, names, folder / f"{count}.json"), count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
