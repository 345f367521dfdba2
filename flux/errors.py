"""The one kind of error that is the user's to mend, and how a program ends on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Wrong input. The message is one line: what we got, what we expected, what to do."""


class Stopped(Exception):
    """Raised from a callback to end a run that its user no longer wants; no fault of anyone."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Ends the program with one line instead of a traceback: status 2 for an `InputError`, 130 for Ctrl-C."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was already written stays", file=sys.stderr)
        sys.exit(130)
