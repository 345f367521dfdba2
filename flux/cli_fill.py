"""A part of an image painted anew, or its surroundings, with the options of upstream's command line.

    python -m flux fill --img_cond_path my.png --img_mask_path mask.png --prompt "a white paper cup" [...]
    python -m flux fill --img_cond_path my.png --outpaint 0.25 --prompt "a wide street" [...]

The mask is white where the image is painted anew. In the loop, /i and /m change image and mask. Further
fields of a demo's model (--weights, --lora, --quantize, ...) may be given too.
"""

from dataclasses import dataclass
from typing import Any

from flux.errors import exit_on_input_error
from flux.sessions import options
from flux.sessions.session import CommandOptions, run_session

MASK = "assets/cup_mask.png"


@dataclass
class SamplingOptions(options.SamplingOptions):
    """One filled image. If no size is given, it has the image's own."""

    img_cond_path: str
    img_mask_path: str | None

    def as_settings(self) -> dict[str, Any]:
        """Return the options by the names of a session's settings."""
        return {**super().as_settings(), "fill": self.img_cond_path, "mask": self.img_mask_path}


@exit_on_input_error()
def main(
    seed: int | None = None, prompt: str = "a white paper cup", device: str = "auto",
    num_steps: int | None = None, loop: bool = False, guidance: float | None = None,
    offload: bool | str = False, output_dir: str = "output", add_sampling_metadata: bool = True,
    img_cond_path: str = "assets/cup.png", img_mask_path: str | None = MASK, track_usage: bool = False,
    name: str = "flux-dev-fill", **model: Any,
) -> None:  # fmt: skip
    """Fill images and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        seed: seed of the first image, each later one's is one higher; if not set, each image gets a new one
        prompt: what the image shows; several prompts, with | between them, make several images
        device: where to run: "auto", "cpu", "cuda", "cuda:1", "mps"
        num_steps: number of denoising steps; if not set, the model's own
        loop: ask for further prompts on the terminal
        guidance: distilled guidance; if not set, the model's own
        offload: keep each model in main memory until it is used; or "blocks", "auto" as in the demos
        output_dir: folder to write to
        add_sampling_metadata: write prompt and model into the files
        img_cond_path: the image
        img_mask_path: the mask, of the image's size, white where it is painted anew
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        name: the model, one of flux.util.configs that fills images
        model: more fields of `flux.settings.demos.SessionSettings`
    """
    size = model.get("width"), model.get("height")
    mask = None if model.get("outpaint") is not None and img_mask_path == MASK else img_mask_path
    options = SamplingOptions(prompt, *size, num_steps, guidance, seed, img_cond_path, mask)
    how = CommandOptions(device, offload, output_dir, loop, add_sampling_metadata, track_usage)
    run_session(name, options, how, model)
