"""LoRA files, by their layers.

    python -m flux.lora COMMAND ...

`python -m flux.lora COMMAND --help` lists a command's options.
"""

import sys
from importlib import import_module

from flux.errors import InputError, exit_on_input_error
from flux.settings.command_line import run
from flux.settings.messages import show

COMMANDS = {
    "report": "what LoRA files change, layer by layer",
    "ablate": "which layers of a LoRA matter, by images without their update",
    "prune": "a LoRA file with some of its layers only",
    "convert": "a LoRA file in the form of kohya, diffusers or BFL",
    "merge": "several LoRA files as one, or merged into a model's weights",
    "extract": "a LoRA from the difference of two checkpoints",
    "train": "a LoRA on a folder of images",
}
"""A line on each command, whose work is in `flux/lora/commands/NAME.py`."""


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names, or print help.

    Raises:
        InputError: There is no such command.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands:")
        print("\n".join(f"  {command:8} {about}" for command, about in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise InputError(f"Got {show(name)}, expected a command first: {', '.join(COMMANDS)}")
    command = import_module(f"flux.lora.commands.{name}")
    fields = getattr(command, "FIELDS", None)
    run(command.main, command.__doc__, fields, positional=command.POSITIONAL, arguments=arguments[1:])


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
