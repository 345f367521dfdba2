"""A run as its visitor sees it: its updates, with steps, time left, previews and finished images."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image

from flux.errors import Stopped
from flux.sampling import Step

PREVIEW_SHARE = 0.2  # of a run's time may go into previews: on a CPU one costs more than a step

R = TypeVar("R")


@dataclass(frozen=True)
class MadeImage:
    """A finished image, with the name its run saves it under, its prompt and its seed."""

    name: str
    image: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True)
class Update(Generic[R]):
    """The state of a run.

    Attributes:
        text: What the run is doing.
        done: Number of steps done.
        total: Number of steps of the whole run. If 0, it is not known.
        seconds_left: Estimated time left. If None, no step has been taken yet.
        preview: The clean image that the last step predicts, small. Most steps have none.
        result: A result that has just been finished. If None, there is none.
    """

    text: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    preview: Image.Image | None = None
    result: R | None = None


class Progress(Generic[R]):
    """Handed to the work of a run: reports its progress and results, and cancels it.

    Every method raises Stopped if the run is cancelled, except `emit`.
    """

    def __init__(
        self,
        preview: Callable[[Step, int, int], Image.Image | None],
        stop: threading.Event,
        put: Callable[[Update[R]], None],
    ):
        self._preview, self._stop, self._put = preview, stop, put
        self._text, self._done, self._total, self._size = "", 0, 0, (0, 0)
        self._begin = self._next_preview = time.perf_counter()

    def begin(self, text: str, total: int, width: int = 0, height: int = 0) -> None:
        """Start counting a number of steps.

        Args:
            text: What the steps do.
            total: How many steps follow.
            width: Width of the image in pixels, if these are sampling steps.
            height: Height of the image in pixels, if these are sampling steps.
        """
        self._text, self._done, self._total, self._size = text, 0, total, (width, height)
        self._begin = time.perf_counter()
        self._update()

    def step(self, step: Step) -> None:
        """Count a sampling step, and show its preview if time allows."""
        self._done += 1
        self.check()
        self._update(preview=self._make_preview(step))

    def step_at(self, step: Step, index: int, total: int) -> None:
        """Count a sampling step whose number and total the caller knows."""
        self._done, self._total = index, total
        self.step(step)

    def advance(self, count: int = 1) -> None:
        """Count steps that have no preview."""
        self._done += count
        self._update()

    def emit(self, result: R) -> None:
        """Report a result, even if the run is cancelled: the result is there."""
        self._put(self._state(result=result))

    def check(self) -> None:
        """Raise Stopped if the run is cancelled."""
        if self._stop.is_set():
            raise Stopped

    def _make_preview(self, step: Step) -> Image.Image | None:
        begin = time.perf_counter()
        if begin < self._next_preview:
            return None
        preview, end = self._preview(step, *self._size), time.perf_counter()
        self._next_preview = end + (end - begin) * (1 / PREVIEW_SHARE - 1)
        return preview

    def _update(self, preview: Image.Image | None = None) -> None:
        self.check()
        self._put(self._state(preview))

    def _state(self, preview: Image.Image | None = None, result: R | None = None) -> Update[R]:
        left = None
        if self._done and self._total:
            left = (time.perf_counter() - self._begin) / self._done * (self._total - self._done)
        return Update(self._text, self._done, self._total, left, preview, result)
