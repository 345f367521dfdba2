"""The one model of the studio: a run at a time, told step by step, stopped within a step."""

import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.nn.functional as F
from PIL import Image

from flux.errors import InputError, Stopped
from flux.images.io import read_image
from flux.metrics.base import Metric
from flux.pipeline import Pipeline
from flux.sampling import Step, pack, unpack
from flux.settings.demos import ModelSettings
from flux.studio.content_filter import ContentFilter

PREVIEW_SIDE = 32  # places of a latent; a larger one is scaled down before it is decoded
PREVIEW_SHARE = 0.2  # of the time of a run is what previews may take: on a CPU they cost more than a step

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """How far a run is.

    Attributes:
        done, total: steps of the whole run; total 0: not known.
        left: seconds it will still take, None before the first step has been taken.
        preview: the clean picture that the last step points at, small; not of each step.
        made: what has just been finished: the name it is given by the run, and the thing.
    """

    text: str
    done: int = 0
    total: int = 0
    left: float | None = None
    preview: Image.Image | None = None
    made: tuple[str, Any] | None = None


class Teller:
    """Handed to the work of a run: it tells how far it is, and learns that it is to stop."""

    def __init__(self, engine: "Engine", stop: threading.Event, put: Callable[[Report], None]):
        self._engine, self._stop, self._put = engine, stop, put
        self._text, self._done, self._total, self._size = "", 0, 0, (0, 0)
        self._begin = self._next_preview = time.perf_counter()

    def begin(self, text: str, total: int, width: int = 0, height: int = 0) -> None:
        """What follows: so many steps, of a picture of that size in pixels if they are sampling steps."""
        self._text, self._done, self._total, self._size = text, 0, total, (width, height)
        self._begin = time.perf_counter()
        self.say(text)

    def say(self, text: str) -> None:
        """Raises Stopped if the run is to stop, as all that follow do."""
        self._text = text
        self._tell()

    def step(self, step: Step, *_) -> None:
        """A sampling step was taken."""
        self._done += 1
        self.check()
        self._tell(preview=self._preview(step))

    def step_of(self, step: Step, index: int, total: int) -> None:
        """The same, from one who counts on its own."""
        self._done, self._total = index, total
        self.step(step)

    def advance(self, count: int = 1) -> None:
        """Steps of another kind were taken."""
        self._done += count
        self._tell()

    def made(self, name: str, thing: Any) -> None:
        self._tell(made=(name, thing))

    def check(self, *_) -> None:
        """Raises Stopped if the run is to stop."""
        if self._stop.is_set():
            raise Stopped

    def _preview(self, step: Step) -> Image.Image | None:
        begin = time.perf_counter()
        if begin < self._next_preview:
            return None
        preview, end = self._engine.preview(step, *self._size), time.perf_counter()
        self._next_preview = end + (end - begin) * (1 / PREVIEW_SHARE - 1)
        return preview

    def _tell(self, **more) -> None:
        # What is made is told also to one who wants to stop: it is there.
        if "made" not in more:
            self.check()
        spent = time.perf_counter() - self._begin
        left = spent / self._done * (self._total - self._done) if self._done and self._total else None
        self._put(Report(self._text, self._done, self._total, left, **more))


class Engine:
    """A loaded model, shared by all visitors.

    Attributes:
        settings: complete ones: the model and its defaults.
        unsafe: says which pictures are not shown; None: all are.
        kept: the last reference that was made, under the key of what it was made from. One for all visitors:
            a reference of FLUX.1 takes gigabytes.
        metrics: what scans compare pictures with, once one has been started.
    """

    def __init__(self, settings: ModelSettings, pipe: Pipeline, unsafe: ContentFilter | None = None):
        self.settings, self.pipe, self.unsafe = settings, pipe, unsafe
        self.kept: tuple[Any, Any] | None = None
        self.metrics: Mapping[str, Metric] | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[Teller], T], stop: threading.Event) -> Generator[Report, None, T | None]:
        """Does the work in a thread of its own and yields what it tells; old news is left out.

        Returns what the work returns, or None if `stop` was set. Closing the generator stops the work.
        """
        news: SimpleQueue[Report | None] = SimpleQueue()
        outcome: dict[str, Any] = {}

        def in_thread() -> None:
            try:
                with self._lock:
                    outcome["result"] = work(Teller(self, stop, news.put))
            except Stopped:
                pass
            except BaseException as error:
                outcome["error"] = error
            news.put(None)

        thread = threading.Thread(target=in_thread, daemon=True)
        thread.start()
        try:
            while (report := news.get()) is not None:
                if report.made or news.empty():
                    yield report
        except GeneratorExit:
            stop.set()
            raise
        finally:
            thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome.get("result")

    def preview(self, step: Step, width: int, height: int) -> Image.Image | None:
        """The first row's predicted clean picture at a side of at most 8 * PREVIEW_SIDE pixels. None if the
        filter objects.
        """
        latent = unpack(step.clean[:1].float(), height, width)
        shrink = min(1.0, PREVIEW_SIDE / max(latent.shape[-2:]))
        sides = [max(2, 2 * round(side * shrink / 2)) for side in latent.shape[-2:]]
        if shrink < 1:
            latent = F.adaptive_avg_pool2d(latent, sides)
        [picture] = self.pipe.decode(pack(latent).to(self.pipe.dtype), 8 * sides[1], 8 * sides[0])
        return None if self.unsafe and self.unsafe(picture) else picture

    def check(self, picture: Image.Image) -> Image.Image:
        """The picture itself. Raises InputError if the filter objects to it."""
        if self.unsafe and self.unsafe(picture):
            raise InputError(
                "The content filter holds this picture unsafe for work, so it is not shown: try another "
                "prompt or seed"
            )
        return picture

    def check_file(self, path: Path) -> None:
        """The same for a picture's file, which is deleted then."""
        try:
            if self.unsafe:
                self.check(read_image(path))
        except InputError:
            path.unlink()
            raise
