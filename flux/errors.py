"""Errors that the user can mend, and how a program ends on one."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TORCHRUN_GRACE_S = 5.0
"""Seconds within which torchrun ends a process after another one has failed."""


class InputError(ValueError):
    """Wrong input. The message is one line for each problem: what we got, what we expected, what to do."""


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message or, if it has none, the error's kind."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


class InputWarning(UserWarning):
    """Input that works otherwise than its user may think. It is shown as one line, "warning: ...".

    Python's own form would put a line of this package's code under the message.
    """


def warn(message: str) -> None:
    """Issue an `InputWarning`, once for each message and place."""
    warnings.warn(message, InputWarning, stacklevel=2)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, InputWarning):
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


_python_format = warnings.formatwarning
warnings.formatwarning = _format_warning


class Stopped(Exception):  # noqa: N818  # a cancelled run is not an error
    """Raised by a callback to end a run that its user has cancelled."""


class Terminated(KeyboardInterrupt):
    """Raised when the program is told to end (SIGTERM), as its base is for Ctrl-C."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the program with one line instead of a traceback.

    The exit status is 2 for `InputError` and where memory ran out, 130 for Ctrl-C and 143 for `Terminated`.
    """
    try:
        yield
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _ran_out_of_memory(error):
            raise
        reason = reason_of(error).partition(". GPU")[0]
        print(
            f"error: Memory ran out ({reason}): give offload auto, or make the image or the batch smaller",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("\nstopped; what was already written stays", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether Python's, or PyTorch's for a GPU or the CPU, is the error. PyTorch may not be imported here."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def raise_when_terminated() -> None:
    """Let SIGTERM raise `Terminated` in the main thread. torchrun's processes end at once, as it expects."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread() and not launched():
        signal.signal(signal.SIGTERM, end)


class _Unfailing(FileIO):
    """An output file that drops what cannot be written, because its reader is gone or the disk is full."""

    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def let_prints_fail() -> None:
    """Let no print end the program: its results are in files, what it prints may be lost.

    Characters that the encoding of stdout or stderr lacks are written as escapes. What goes to a closed pipe
    is dropped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        file = getattr(stream.buffer, "raw", stream.buffer)  # with python -u there is no buffer between
        if type(file) is FileIO and stream is getattr(sys, f"__{name}__"):
            unfailing = _Unfailing(file.fileno(), "w", closefd=False)
            buffer = TextIOWrapper(
                unfailing if stream.write_through else BufferedWriter(unfailing),  # python -u writes at once
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, buffer)


def launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def only_rank_zero_prints() -> Iterator[None]:
    """Under torchrun, silence all processes but the first, except for an error that only they raise.

    Once one process has failed, torchrun ends the others. A process whose error another one reports waits for
    that instead of reporting it again.
    """
    if not launched():
        yield
        return
    is_first = os.environ["RANK"] == "0"
    try:
        with ExitStack() as stack:
            if not is_first:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    except (Exception, KeyboardInterrupt) as error:
        # The first process reports what all raise. gloo's complaint only means that another one has ended.
        if not is_first or "gloo" in str(error):
            time.sleep(TORCHRUN_GRACE_S)
        raise
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
