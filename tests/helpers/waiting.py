"""Waiting for what others do: other processes, threads or a server."""

import time
from collections.abc import Callable

WAIT = 240  # seconds for what must come to pass, however busy the machine is


def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds: however slow the machine is, the order of things is the same."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
