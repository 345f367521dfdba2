"""The options of one image, and the commands that change them in a loop."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from flux.errors import InputError


@dataclass
class SamplingOptions:
    """One image to be made, with sizes in pixels.

    If the seed is None, each image gets a new one. If another number is None, the model's own is used.
    """

    prompt: str
    width: int | None
    height: int | None
    num_steps: int | None
    guidance: float | None
    seed: int | None

    def numbers(self) -> dict[str, Any]:
        """Return the options that are fields of a model's settings."""
        return {name: getattr(self, name) for name in ("width", "height", "num_steps", "guidance")}

    def as_settings(self) -> dict[str, Any]:
        """Return all options but the prompt by the names of a session's settings."""
        return {**self.numbers(), "seed": self.seed}


Options = TypeVar("Options", bound=SamplingOptions)


def _size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def _ratio(text: str) -> str | None:
    return None if text == "auto" else text


# Each command: the option that it sets, how its value is read, and what the help says of it.
COMMANDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "/w": ("width", _size, "width, or auto"),
    "/h": ("height", _size, "height, or auto"),
    "/ar": ("aspect_ratio", _ratio, "shape of the image, such as 16:9, or auto"),
    "/n": ("num_steps", int, "steps"),
    "/g": ("guidance", float, "guidance"),
    "/i": ("img_cond_path", str, "file of the image"),
    "/m": ("img_mask_path", str, "file of the mask"),
    "/l": ("lora_scale", float, "strength of the model's LoRA"),
}


def help_of(options: SamplingOptions) -> str:
    """Return the help for the commands that these options have."""
    lines = ["Type a prompt and press Enter. The commands are:"]
    for word, (name, kind, about) in COMMANDS.items():
        if _has(options, name):
            value = {int: "N", _size: "N", float: "X"}.get(kind, "TEXT")
            lines.append(f"  {word:3} {value:5} {about}")
    lines.append("  /s  N     seed (without a number: a new one each time)")
    lines.append("  /q        quit       an empty line repeats the last prompt")
    return "\n".join(lines)


def _has(options: SamplingOptions, name: str) -> bool:
    return any(each.name == name for each in fields(options))


def read_command(line: str, options: Options) -> tuple[Options, str | None]:
    """Read one line typed in the loop.

    Returns:
        The options after it, and the answer if the line was a command. If that is None, it was a prompt.

    Raises:
        InputError: The command is unknown, or its value is missing or of another kind.
    """
    if not line.startswith("/"):
        return (replace(options, prompt=line) if line else options), None
    word, _, value = line.partition(" ")
    value = value.strip()
    try:
        if word == "/s":
            options = replace(options, seed=int(value) if value else None)
            return options, f"seed: {value or 'a new one each time'}"
        name, kind, _ = COMMANDS[word]
        if not value or not _has(options, name):
            raise KeyError(word)
        options = replace(options, **{name: kind(value)})
        if name == "aspect_ratio":
            options = replace(options, width=None, height=None)
        return options, f"{name}: {value}"
    except (KeyError, ValueError) as error:
        raise InputError(f"Got {line!r}. {help_of(options)}") from error


def ask(options: Options, use: Callable[[Options], None]) -> Options | None:
    """Ask for the next prompt on the terminal, and answer the commands before it.

    Args:
        options: The options so far.
        use: Called with the options after each command. Options that raise InputError are not kept.

    Returns:
        The options for the next image. If None, the user has quit.
    """
    while True:
        try:
            line = input("prompt> ").strip()
        except EOFError:
            return None
        if line in ("/q", "/quit"):
            return None
        try:
            changed, answer = read_command(line, options)
            if answer is not None:
                use(changed)
            options = changed
        except InputError as error:
            answer = str(error)
        if answer is None:
            return options
        print(answer)
