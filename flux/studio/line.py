"""The line of runs that wait for the model: whose turn it is, how long that takes, and who may join."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flux.errors import InputError
from flux.studio.progress import Update

LOOK_SECONDS = 1.0  # between two looks of a waiting run: by then a visitor who has left is noticed
REMEMBERED = 20  # durations of runs, from which the waiting time is estimated


@dataclass(eq=False)
class Job:
    """A run in the line.

    Attributes:
        caller: The page or program that it belongs to, by gradio's session hash.
        address: The address that it came from.
        tab: The tab of the page, or the endpoint.
        stop: Set to cancel it, also while it waits.
        begun: When its turn came, by `time.monotonic`. None while it waits.
    """

    caller: str
    address: str
    tab: str
    stop: threading.Event = field(default_factory=threading.Event)
    begun: float | None = None


class Line:
    """The runs that wait, and the one whose turn it is.

    Callers take turns: nobody's second run comes before another's first one.

    Args:
        most: The most runs in the line.
        most_each: The most of one caller. An address may have half of the line.
    """

    def __init__(self, most: int = 64, most_each: int = 8):
        self._most, self._most_each = most, most_each
        self._jobs: list[Job] = []  # in the order in which they joined
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._changed = threading.Condition()
        self._is_closed = False

    @contextmanager
    def join(self, caller: str | None, tab: str, address: str = "") -> Iterator[Job]:
        """Join the line, and leave it at the end of the block.

        Raises:
            InputError: The line is full, or too many of its runs belong to this caller or address.
        """
        job = Job(caller or "", address, tab)
        with self._changed:
            self._check(job)
            self._jobs.append(job)
        try:
            yield job
        finally:
            with self._changed:
                self._jobs.remove(job)
                if job.begun is not None and not job.stop.is_set():
                    self._durations.append(time.monotonic() - job.begun)
                self._changed.notify_all()

    def _check(self, job: Job) -> None:
        if self._is_closed:
            raise InputError("The studio is closing: try again later")
        if sum(other.caller == job.caller for other in self._jobs) >= self._most_each:
            raise InputError(f"Got more than {self._most_each} runs at once: wait until some are done")
        of_address = sum(other.address == job.address for other in self._jobs)
        if len(self._jobs) >= self._most or (job.address and of_address >= self._most // 2):
            raise InputError(f"The studio is busy, {len(self._jobs)} runs wait: try again in some minutes")

    def wait(self, job: Job) -> Iterator[Update]:
        """Wait for the job's turn, and yield its place and the time left about once a second.

        It ends as soon as it is the job's turn, or the job is stopped.
        """
        while not job.stop.is_set() and not self._begin(job):
            yield self._place(job)
            with self._changed:
                self._changed.wait(LOOK_SECONDS)

    def _begin(self, job: Job) -> bool:
        with self._changed:
            if any(other.begun is not None for other in self._jobs) or self._order()[0] is not job:
                return False
            job.begun = time.monotonic()
            return True

    def _order(self) -> list[Job]:
        """List the waiting jobs in the order of their turns."""
        ranks, counts = {}, dict[str, int]()
        for job in self._jobs:
            ranks[job] = counts.get(job.caller, 0)
            counts[job.caller] = ranks[job] + 1
        waiting = [job for job in self._jobs if job.begun is None and not job.stop.is_set()]
        return sorted(waiting, key=lambda job: ranks[job])

    def _place(self, job: Job) -> Update:
        with self._changed:
            order = self._order()
            running = next((other for other in self._jobs if other.begun is not None), None)
            before = order.index(job) if job in order else 0
            left = None
            if self._durations:
                usual = sum(self._durations) / len(self._durations)
                passed = time.monotonic() - (running.begun or 0) if running else usual
                # Nothing is known once a run takes longer than usual.
                left = before * usual + max(0.0, usual - passed) or None
        own = running is not None and running.caller == job.caller
        if before == 0:
            return Update("waiting for your other run" if own else "waiting, next in line", seconds_left=left)
        return Update(f"waiting, {before + (running is not None)} runs before yours", seconds_left=left)

    def stop(self, caller: str | None, tab: str) -> None:
        """Cancel the runs of a caller's tab, whether they wait or not."""
        with self._changed:
            for job in self._jobs:
                if job.caller == (caller or "") and job.tab == tab:
                    job.stop.set()
            self._changed.notify_all()

    def has(self, caller: str | None, tab: str) -> bool:
        """Tell whether a run of a caller's tab is in the line."""
        with self._changed:
            return any(job.caller == (caller or "") and job.tab == tab for job in self._jobs)

    def close(self, seconds: float = 10.0) -> bool:
        """Cancel all runs and let nobody join. Return whether all have ended within that time."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs:
                job.stop.set()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._jobs, seconds)
