"""Who is connected: pages and programs, by the session hash that gradio gives each."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

GONE_SECONDS = 5.0  # without a connection, until a caller's runs are cancelled
UNHEARD_SECONDS = 60.0  # until a program has to listen to what it asked for
IDLE_SECONDS = 600.0  # without a request, until a caller is forgotten


@dataclass
class _Caller:
    address: str
    seen: float
    is_event: bool
    streams: int = 0
    listened: bool = False


class Callers:
    """The pages and programs that have asked for something lately.

    Args:
        most: The most callers that one address may have. More are refused: each costs memory, and their
            names are free to make up.
    """

    def __init__(self, most: int = 256):
        self._most = most
        self._callers: dict[str, _Caller] = {}
        self._lock = threading.Lock()

    def admit(self, name: str, address: str, is_event: bool = False) -> bool:
        """Note a request of a caller. Return whether the caller is known or may become so.

        Args:
            name: The caller.
            address: Where the request comes from.
            is_event: Whether the name is that of one event, by which gradio calls a program without a name
                of its own. It is forgotten as soon as the event is over, so any number may follow.
        """
        with self._lock:
            caller = self._callers.get(name)
            if caller is None:
                lasting = [other for other in self._callers.values() if not other.is_event]
                if not is_event and sum(other.address == address for other in lasting) >= self._most:
                    return False
                caller = self._callers[name] = _Caller(address, time.monotonic(), is_event)
            caller.seen = time.monotonic()
            return True

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """Note that a caller is connected, as long as the block lasts."""
        with self._lock:
            if caller := self._callers.get(name):
                caller.streams, caller.listened = caller.streams + 1, True
        try:
            yield
        finally:
            with self._lock:
                if caller:
                    caller.streams, caller.seen = caller.streams - 1, time.monotonic()

    def is_gone(self, name: str | None) -> bool:
        """Tell whether a caller has not been connected for GONE_SECONDS, or a program never was in time."""
        with self._lock:
            caller = self._callers.get(name or "")
            return caller is not None and self._without_connection(caller) > self._patience(caller)

    def address(self, name: str | None) -> str:
        """Return the address of a caller, "" if it is not known."""
        with self._lock:
            caller = self._callers.get(name or "")
            return caller.address if caller else ""

    def forget_idle(self, seconds: float = IDLE_SECONDS) -> list[str]:
        """Forget the callers without a connection or request for so long, and return their names."""
        with self._lock:
            idle = [
                name
                for name, caller in self._callers.items()
                if self._without_connection(caller)
                > (2 * self._patience(caller) if caller.is_event else seconds)
            ]
            for name in idle:
                del self._callers[name]
        return idle

    @staticmethod
    def _patience(caller: _Caller) -> float:
        if caller.listened:
            return GONE_SECONDS
        return UNHEARD_SECONDS if caller.is_event else math.inf

    @staticmethod
    def _without_connection(caller: _Caller) -> float:
        return 0.0 if caller.streams else time.monotonic() - caller.seen
