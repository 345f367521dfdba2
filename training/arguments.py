"""The command lines of the training: errors in one line, as those of the other programs."""

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from flux.errors import exit_on_input_error, let_prints_fail, raise_when_terminated


class Parser(ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end the program with status 2."""
        self.exit(2, f"error: {message}\n")


def at_least(smallest: int) -> Callable[[str], int]:
    """Return a type of arguments: whole numbers from `smallest` on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise ArgumentTypeError(f"got {text}, expected a whole number from {smallest} on")
        return int(text)

    return whole_number


def above_zero(text: str) -> float:
    """Read an argument that is a number above 0. Raises ArgumentTypeError if it is another one, or none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise ArgumentTypeError(f"got {text}, expected a number above 0")
    return number


def start(main: Callable[[], None]) -> None:
    """Call a program's function. Wrong input, Ctrl-C and SIGTERM end it with one line."""
    let_prints_fail()
    raise_when_terminated()
    with exit_on_input_error():
        main()
