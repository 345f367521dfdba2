"""Sampling one image while some layers' attention is watched."""

from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from flux.attention.maps import LayerAttention, look
from flux.attention.tokens import find_word, text_tokens
from flux.errors import InputError
from flux.intervention import NOTHING, Intervention, check_layers
from flux.pipeline import Pipeline
from flux.sampling import Step, sample
from flux.settings.demos import LayerSettings
from flux.specs import get_spec


@dataclass(frozen=True, eq=False)
class StepAttention:
    """Step number `index`, from noise level `t` on: the attention of each layer that was looked at."""

    index: int
    t: float
    layers: dict[int, LayerAttention]


def steps_to_watch(settings: LayerSettings) -> list[int]:
    """The chosen steps, or else the first, the middle and the last. Raises InputError for one not there."""
    last = settings.num_steps - 1
    if wrong := [step for step in settings.at_steps if not 0 <= step <= last]:
        raise InputError(f"Got at_steps {wrong}, but the {settings.num_steps} steps are numbered 0..{last}")
    return sorted(set(settings.at_steps or (0, settings.num_steps // 2, last)))


def check_watch(settings: LayerSettings) -> None:
    """Raises InputError if layers, steps or words are to be looked at that are not there, before a model is
    loaded. The settings are complete ones.
    """
    check_layers(settings.layers, get_spec(settings.model).num_layers)
    steps_to_watch(settings)
    for entry in settings.prompts:
        for word in settings.words:
            find_word(entry.prompt, word)


def watch(
    pipe: Pipeline,
    prompt: str,
    seed: int,
    settings: LayerSettings,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[list[Step], list[StepAttention]]:
    """Samples one picture as `Pipeline.generate` does: its steps, and the attention of `settings.layers` in
    the steps to watch.

    With true guidance the pass of the prompt is looked at, not the negative one. The queries and keys of one
    watched step lie in memory until they have been looked at: at 1024x1024 in bfloat16, 57 MB a layer.

    Args:
        settings: complete ones (`flux.settings.complete.resolve`).
        on_step: called with each step as soon as it is taken; an exception from it ends the run.

    Raises:
        InputError: as `text_tokens` and `steps_to_watch`.
    """
    chosen = steps_to_watch(settings) if settings.layers else []
    tokens = text_tokens(pipe.t5, prompt, settings.words) if chosen else None
    watching = Intervention(watch=frozenset(settings.layers))
    interventions = [watching if index in chosen else NOTHING for index in range(settings.num_steps)]

    cond = pipe.condition([prompt], settings.guidance, settings.true_cfg, settings.negative_prompt)
    size = (settings.width, settings.height)
    noise, ids = pipe.noise([seed], *size), pipe.image_ids(1, *size)
    levels = pipe.schedule(settings.num_steps, *size)
    steps, seen = [], []
    with pipe.denoising() as model:
        taken = sample(model, noise, ids, cond, levels, interventions)
        for step in tqdm(taken, total=settings.num_steps, desc="denoise", unit="step", disable=not progress):
            if len(steps) in chosen:
                # Taken out of the step, which lives on, they are free as soon as they have been looked at.
                found = {layer: look(*step.watched.pop(layer), tokens) for layer in settings.layers}
                seen.append(StepAttention(len(steps), step.t, found))
            steps.append(step)
            if on_step:
                on_step(step)
    return steps, seen
