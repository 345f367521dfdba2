"""Images with the edges or the depth of another, with the options of upstream's command line.

    python -m flux control --name flux-dev-canny --img_cond_path my.png --prompt "a golden robot" [...]

In the loop, /i changes the image, and /l the strength of a model that is a LoRA. Further fields of a demo's
model (--weights, --lora, --quantize, ...) may be given too.
"""

from dataclasses import dataclass
from typing import Any

from flux.errors import exit_on_input_error
from flux.sessions import options
from flux.sessions.session import CommandOptions, run_session


@dataclass
class SamplingOptions(options.SamplingOptions):
    """One image with a control image. If no size is given, it has the control image's shape."""

    img_cond_path: str
    lora_scale: float | None

    def as_settings(self) -> dict[str, Any]:
        """Return the options by the names of a session's settings."""
        return {**super().as_settings(), "control": self.img_cond_path, "lora_scale": self.lora_scale}


@exit_on_input_error()
def main(
    name: str, width: int | None = None, height: int | None = None, seed: int | None = None,
    prompt: str = "a robot made out of gold", device: str = "auto", num_steps: int | None = None,
    loop: bool = False, guidance: float | None = None, offload: bool | str = False,
    output_dir: str = "output", add_sampling_metadata: bool = True,
    img_cond_path: str = "assets/robot.webp", lora_scale: float | None = None, track_usage: bool = False,
    **model: Any,
) -> None:  # fmt: skip
    """Make images and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, one of flux.util.configs that takes a control image
        width: width in pixels, rounded down to a multiple of 16; if not set, of the control image's shape
        height: height in pixels, likewise
        seed: seed of the first image, each later one's is one higher; if not set, each image gets a new one
        prompt: what to show; several prompts, with | between them, make several images
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        num_steps: number of denoising steps; if not set, the model's own
        loop: ask for further prompts on the terminal
        guidance: distilled guidance; if not set, the model's own
        offload: keep each model in main memory until it is used; or "blocks", "auto" as in the demos
        output_dir: folder to write to
        add_sampling_metadata: write prompt and model into the files
        img_cond_path: the image whose edges or depth are taken
        lora_scale: strength of a model that is a LoRA; if not set, its own
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        model: more fields of `flux.settings.demos.SessionSettings`
    """
    options = SamplingOptions(prompt, width, height, num_steps, guidance, seed, img_cond_path, lora_scale)
    how = CommandOptions(device, offload, output_dir, loop, add_sampling_metadata, track_usage)
    run_session(name, options, how, model)
