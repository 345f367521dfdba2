"""Does a prompt describe a photograph? An edit of one whose prompt is another image's keeps little of it."""

from torch import Tensor

from flux.editing.inversion import velocity_at
from flux.errors import warn
from flux.loaded_model import LoadedModel
from flux.modules.conditioner import shortened

NOISE_LEVEL = 0.6
SEED = 0
WORST_FIT = 1.1
"""Between the fits of right prompts (at most 1.06) and of other images' (at least 1.14).

Measured with flux-nano over 120 photographs of its benchmark at 256x256, each with its own prompt and another
one's. Smaller images tell less, and of prompts with a single wrong word about a third are below it.
"""


def prompt_fit(pipe: LoadedModel, prompt: str, clean: Tensor, width: int, height: int) -> float:
    """Measure how well a prompt describes a photograph: 1 is as well as no prompt, less is better.

    It is the error of the velocity that the model predicts with the prompt, divided by that without one. With
    the photograph's latent z, noise e and noise level t, the velocity at (1 - t) z + t e should be e - z.

    Args:
        pipe: The models.
        prompt: The prompt.
        clean: The photograph's latent, "1 I 64".
        width: Width of the photograph's part that is edited, in pixels.
        height: Likewise.
    """
    noise, ids = pipe.noise([SEED], width, height), pipe.image_ids(1, width, height)
    latent = (1 - NOISE_LEVEL) * clean + NOISE_LEVEL * noise
    conds = [pipe.condition([text], 1.0) for text in (prompt, "")]
    with pipe.denoising() as model:
        velocities = [velocity_at(model, latent, ids, cond, NOISE_LEVEL) for cond in conds]
    error, error_without = ((v - (noise - clean)).float().square().mean().item() for v in velocities)
    return error / error_without


def warn_of_unfit_prompt(pipe: LoadedModel, prompt: str, clean: Tensor, width: int, height: int) -> None:
    """Warn of a prompt that describes a photograph worse than none. For the arguments see `prompt_fit`."""
    if prompt.strip() and prompt_fit(pipe, prompt, clean, width, height) > WORST_FIT:
        warn(
            f"{shortened(prompt)!r} fits this photo worse than no prompt at all: does it say what is on the "
            "photo? What the edit is to show stands in edits"
        )
