"""Sampling one image while the attention of some layers is watched."""

from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from flux.attention.maps import LayerAttention, layer_attention
from flux.attention.tokens import find_word, text_tokens
from flux.errors import InputError
from flux.intervention import NOTHING, Intervention, check_layers
from flux.loaded_model import LoadedModel
from flux.sampling import Step, sample
from flux.settings.resolved import ResolvedLayer
from flux.specs import get_spec


@dataclass(frozen=True, eq=False)
class StepAttention:
    """The attention of each watched layer in step number `index`, which begins at noise level `t`."""

    index: int
    t: float
    layers: dict[int, LayerAttention]


def steps_to_watch(settings: ResolvedLayer) -> list[int]:
    """List the chosen steps, by default the first, the middle and the last.

    Raises:
        InputError: A chosen step does not exist.
    """
    last = settings.num_steps - 1
    if wrong := [step for step in settings.at_steps if not 0 <= step <= last]:
        raise InputError(f"Got at_steps {wrong}, but the {settings.num_steps} steps are numbered 0..{last}")
    return sorted(set(settings.at_steps or (0, settings.num_steps // 2, last)))


def check_watch(settings: ResolvedLayer) -> None:
    """Check before a model is loaded that the layers, steps and words to watch exist.

    Raises:
        InputError: One does not.
    """
    check_layers(settings.layers, get_spec(settings.model).num_layers)
    steps_to_watch(settings)
    for entry in settings.prompts:
        for word in settings.words:
            find_word(entry.prompt, word)


def watch(
    pipe: LoadedModel,
    prompt: str,
    seed: int,
    settings: ResolvedLayer,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[list[Step], list[StepAttention]]:
    """Sample one image as `LoadedModel.generate` does, and measure the attention of `settings.layers`.

    With true CFG, the pass of the prompt is watched, not the negative one. The queries and keys of one
    watched step stay in memory until they have been measured: at 1024x1024 in bfloat16, 57 MB for each layer.

    Args:
        pipe: The models.
        prompt: What the image shows.
        seed: Seed of the noise.
        settings: How to sample, and what to watch.
        progress: Whether to show a progress bar.
        on_step: Called with each step as soon as it is taken. An exception from it ends the run.

    Returns:
        All steps, and the attention in the watched ones.

    Raises:
        InputError: As `text_tokens` and `steps_to_watch`.
    """
    chosen = steps_to_watch(settings) if settings.layers else []
    tokens = text_tokens(pipe.t5, prompt, settings.words) if chosen else None
    watching = Intervention(watch=frozenset(settings.layers))
    interventions = [watching if index in chosen else NOTHING for index in range(settings.num_steps)]

    cond = pipe.condition([prompt], settings.guidance, settings.true_cfg, settings.negative_prompt)
    size = (settings.width, settings.height)
    noise, ids = pipe.noise([seed], *size), pipe.image_ids(1, *size)
    levels = pipe.schedule(settings.num_steps, *size)
    steps, attention = [], []
    with pipe.denoising() as model:
        sampled = sample(model, noise, ids, cond, levels, interventions)
        for step in tqdm(
            sampled, total=settings.num_steps, desc="denoise", unit="step", disable=not progress
        ):
            if tokens and len(steps) in chosen:
                # Popped from the step, which stays, so that they are freed as soon as they are measured.
                layers = {n: layer_attention(*step.watched.pop(n), tokens) for n in settings.layers}
                attention.append(StepAttention(len(steps), step.t, layers))
            steps.append(step)
            if on_step:
                on_step(step)
    return steps, attention
