"""The one kind of error that is the user's to mend, and how a program ends on it."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

PATIENCE = 5.0  # seconds in which torchrun ends a process that another one's error has left alone


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


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def one_voice() -> Iterator[None]:
    """Of the processes that torchrun starts, only the first one is heard, unless an error is another's alone.

    Whichever fails, torchrun ends the others.
    """
    if not launched():
        yield
        return
    rank = int(os.environ["RANK"])
    try:
        with ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    except (Exception, KeyboardInterrupt) as error:
        # The first one says what all fail of, and one that another's end cut off, as gloo then reports, has
        # nothing to say: torchrun ends these meanwhile.
        if rank or "gloo" in str(error):
            time.sleep(PATIENCE)
        raise
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
