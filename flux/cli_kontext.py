"""Images edited by an instruction, with the options of upstream's command line.

    python -m flux kontext --img_cond_path my.png --prompt "make it night" [--aspect_ratio 16:9] [...]

Several images are given with commas between them. In the loop, /i changes them and /ar the shape. Further
fields of a demo's model (--weights, --lora, --quantize, ...) may be given too.
"""

from dataclasses import dataclass
from typing import Any

from flux.errors import exit_on_input_error
from flux.sessions import options
from flux.sessions.session import CommandOptions, run_session
from flux.settings.fields import Files


@dataclass
class SamplingOptions(options.SamplingOptions):
    """One edited image. If neither a size nor an aspect ratio is given, it has the context image's shape."""

    img_cond_path: Files
    aspect_ratio: str | None = None

    def as_settings(self) -> dict[str, Any]:
        """Return the options by the names of a session's settings."""
        return {**super().as_settings(), "context": self.img_cond_path, "aspect_ratio": self.aspect_ratio}


@exit_on_input_error()
def main(
    name: str = "flux-dev-kontext", aspect_ratio: str | None = None, seed: int | None = None,
    prompt: str = "replace the logo with the text 'Black Forest Labs'", device: str = "auto",
    num_steps: int | None = None, loop: bool = False, guidance: float | None = None,
    offload: bool | str = False, output_dir: str = "output", add_sampling_metadata: bool = True,
    img_cond_path: Files = ("assets/cup.png",), track_usage: bool = False, **model: Any,
) -> None:  # fmt: skip
    """Edit images and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, one of flux.util.configs that takes context images
        aspect_ratio: shape of the images, such as 16:9; if not set, that of the context image
        seed: seed of the first image, each later one's is one higher; if not set, each image gets a new one
        prompt: the instruction; several instructions, with | between them, make several images
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        num_steps: number of denoising steps; if not set, the model's own
        loop: ask for further instructions on the terminal
        guidance: distilled guidance; if not set, the model's own
        offload: keep each model in main memory until it is used; or "blocks", "auto" as in the demos
        output_dir: folder to write to
        add_sampling_metadata: write instruction and model into the files
        img_cond_path: the image to edit, or several, with commas between them
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        model: more fields of `flux.settings.demos.SessionSettings`
    """
    size = model.get("width"), model.get("height")
    options = SamplingOptions(prompt, *size, num_steps, guidance, seed, img_cond_path, aspect_ratio)
    how = CommandOptions(device, offload, output_dir, loop, add_sampling_metadata, track_usage)
    run_session(name, options, how, model)
