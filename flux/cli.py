"""Images from prompts, once or in a loop, with the options of upstream's command line.

    python -m flux [--name flux-dev] [--prompt "a dog|a cat"] [--width 1024] [--height 1024] [--loop] [...]
    python -m flux kontext|fill|control|redux --img_cond_path my.png [...]
    python -m flux download NAME

The first form writes img_0.jpg, img_1.jpg, ... to output_dir, and so do the commands of the second form, for
models that an image steers (their own --help tells more). Further fields of a demo's model (--weights,
--lora, --quantize, ...) may be given too. The last form fetches a model's files in advance.
"""

import sys
from importlib import import_module
from typing import Any

from flux.errors import InputError, exit_on_input_error
from flux.sessions.options import SamplingOptions
from flux.sessions.session import NOT_OPTIONS, CommandOptions, run_session

__all__ = ["SamplingOptions", "app", "main"]

DEFAULT_PROMPT = "a dog wearing a top hat on the grass"
COMMANDS = {
    "kontext": {"context_positions", "reference_strength", "context_every"},
    "fill": {"outpaint", "overlap", "paste_back"},
    "control": {"depth_model"},
    "redux": {"redux_strength", "siglip"},
}
"""The commands for models that an image steers, and the fields of conditions that each takes."""


@exit_on_input_error()
def main(
    name: str = "flux-nano", width: int | None = None, height: int | None = None, seed: int | None = None,
    prompt: str = DEFAULT_PROMPT, device: str = "auto", num_steps: int | None = None, loop: bool = False,
    guidance: float | None = None, offload: bool | str = False, output_dir: str = "output",
    add_sampling_metadata: bool = True, track_usage: bool = False,
    init_image: str | None = None, strength: float = 0.8,
    true_cfg: float | None = None, negative_prompt: str = "", **model: Any,
) -> None:  # fmt: skip
    """Make images and save them as img_0.jpg, img_1.jpg, ... in a folder.

    Args:
        name: the model, one of flux.util.configs, or of flux.specs.HOSTED (key in BFL_API_KEY)
        width: width in pixels, rounded down to a multiple of 16; if not set, the model's own
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
        track_usage: report each image to BFL, for licensed users (key in BFL_API_KEY)
        init_image: start from this image: image-to-image; it is scaled and cropped to width and height
        strength: how much of the schedule then runs, above 0 and at most 1; 1 keeps nothing of the image
        true_cfg: true CFG away from negative_prompt, above 1
        negative_prompt: what true CFG leads away from
        model: more fields of a model's settings
    """
    options = SamplingOptions(prompt, width, height, num_steps, guidance, seed)
    how = CommandOptions(device, offload, output_dir, loop, add_sampling_metadata, track_usage)
    more = {
        "true_cfg": true_cfg,
        "negative_prompt": negative_prompt,
        "init_image": init_image,
        "strength": strength,
        **model,
    }
    run_session(name, options, how, more)


@exit_on_input_error()
def fetch_model(name: str) -> None:
    """Fetch a model's files in advance and print where they are.

    Args:
        name: The model, one of flux.util.configs
    """
    from flux.weights.hub import download

    download(name)


@exit_on_input_error()
def app() -> None:
    """Run `python -m flux` and the `flux` command. Upstream's sub-command t2i may be named or left out."""
    from flux.settings.command_line import run
    from flux.settings.conditions import ConditionSettings
    from flux.settings.demos import SessionSettings

    first, rest = sys.argv[1:2], sys.argv[2:]
    if first == ["download"]:
        run(fetch_model, __doc__, positional="name", arguments=rest)
        return
    fields = {name: field for name, field in SessionSettings.model_fields.items() if name not in NOT_OPTIONS}
    if first and first[0] in COMMANDS:
        command = import_module(f"flux.cli_{first[0]}")
        others = ConditionSettings.model_fields.keys() - COMMANDS[first[0]]
        fields = {name: field for name, field in fields.items() if name not in others}
        run(command.main, command.__doc__, fields, arguments=rest)
    elif first and first != ["t2i"] and not first[0].startswith("-"):
        known = ", ".join(["t2i", *COMMANDS, "download"])
        raise InputError(
            f"Got {first[0]!r}, which is no command: name one of {known}, or write --prompt before a prompt"
        )
    else:
        run(main, __doc__, fields, arguments=rest if first == ["t2i"] else sys.argv[1:])
