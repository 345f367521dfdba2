"""Variations of an image, with the options of upstream's command line.

    python -m flux redux --img_cond_path my.png [--name flux-schnell] [--prompt "in the rain"] [--loop] [...]

Several images, with commas between them, are mixed. In the loop, /i changes them. Further fields of a demo's
model (--weights, --lora, --quantize, ...) may be given too.
"""

from dataclasses import dataclass
from typing import Any

from flux.errors import exit_on_input_error
from flux.sessions import options
from flux.sessions.session import CommandOptions, run_session
from flux.settings.fields import Files


@dataclass
class SamplingOptions(options.SamplingOptions):
    """One variation."""

    img_cond_path: Files

    def as_settings(self) -> dict[str, Any]:
        """Return the options by the names of a session's settings."""
        return {**super().as_settings(), "redux": self.img_cond_path}


@exit_on_input_error()
def main(
    name: str = "flux-dev", width: int | None = 1360, height: int | None = 768, seed: int | None = None,
    device: str = "auto", num_steps: int | None = None, loop: bool = False, guidance: float | None = None,
    offload: bool | str = False, output_dir: str = "output", add_sampling_metadata: bool = True,
    img_cond_path: Files = ("assets/robot.webp",), track_usage: bool = False, prompt: str = "",
    **model: Any,
) -> None:  # fmt: skip
    """Make variations and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, a text-to-image model of flux.util.configs that has a Redux adapter
        width: width in pixels, rounded down to a multiple of 16
        height: height in pixels, likewise
        seed: seed of the first image, each later one's is one higher; if not set, each image gets a new one
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        num_steps: number of denoising steps; if not set, the model's own
        loop: ask for further images on the terminal
        guidance: distilled guidance; if not set, 2.5
        offload: keep each model in main memory until it is used; or "blocks", "auto" as in the demos
        output_dir: folder to write to
        add_sampling_metadata: write the model and the image's name into the files
        img_cond_path: the image to vary, or several, with commas between them
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        prompt: what to show besides; the published adapter mostly follows the image
        model: more fields of `flux.settings.demos.SessionSettings`
    """
    from flux.specs import get_spec

    if guidance is None and get_spec(name).params.guidance_embed:
        guidance = 2.5
    options = SamplingOptions(prompt, width, height, num_steps, guidance, seed, img_cond_path)
    how = CommandOptions(device, offload, output_dir, loop, add_sampling_metadata, track_usage)
    run_session(name, options, how, model)
