"""The studio's models: one run at a time, with progress, previews, and cancelling within a step."""

import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.nn.functional as F
from PIL import Image

from flux.content_filters import ContentFilter
from flux.editing.reference import Reference
from flux.errors import InputError, InputWarning, Stopped
from flux.images.io import read_image
from flux.loaded_model import LoadedModel
from flux.metrics.base import Metric
from flux.modules.conditioner import TextReader
from flux.runtime.devices import pick_device, pick_dtype
from flux.sampling import Step, pack, unpack
from flux.settings.resolved import ResolvedModel
from flux.specs import get_spec
from flux.studio.memory import Memory
from flux.studio.progress import Progress, Update
from flux.weights.find import find_model
from flux.weights.open_model import OpenModel

PREVIEW_SIDE = 32  # latent pixels; a larger latent is scaled down before it is decoded

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class KeptReference:
    """A reference that edits may use again.

    Attributes:
        key: What shaped it: its `reference_fields`, and the pixels of the images that it began with.
        reference: The reference.
        id: A name that no other reference has.
    """

    key: tuple[dict[str, Any], object]
    reference: Reference
    id: str = field(default_factory=lambda: uuid4().hex)


class Engine:
    """A model, shared by all visitors. It is loaded when a run needs it, and may be freed between two runs.

    Attributes:
        settings: Settings of the model, and defaults for every run.
        unsafe: Tells which images are not shown. If None, all are shown.
        memory: The models in memory, of all engines of a studio.
        kept: The last reference. One for all visitors, since a reference of FLUX.1 takes gigabytes.
        metrics: What scans compare images with. None until the first scan.
    """

    def __init__(
        self,
        settings: ResolvedModel,
        pipe: LoadedModel | None = None,
        unsafe: ContentFilter | None = None,
        memory: Memory | None = None,
    ):
        """Make an engine.

        Args:
            settings: Settings of the model.
            pipe: The loaded model. If None, it is loaded with the first run.
            unsafe: As the attribute.
            memory: As the attribute. If None, no other engine shares it.
        """
        self.settings, self.unsafe, self.memory = settings, unsafe, memory or Memory()
        self.kept: KeptReference | None = None
        self.metrics: Mapping[str, Metric] | None = None
        self._pipe = pipe
        self._reader: TextReader | None = None
        if pipe:
            self.memory.add(self)

    @property
    def pipe(self) -> LoadedModel:
        """The loaded model. Only a run may rely on it."""
        if self._pipe is None:
            raise RuntimeError(f"{self.settings.model} is not loaded")
        return self._pipe

    @pipe.setter
    def pipe(self, pipe: LoadedModel) -> None:
        self._pipe = pipe

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._pipe is not None

    @property
    def is_offloaded(self) -> bool:
        """Whether parts of the loaded model wait in main memory. False as long as it is not loaded."""
        return self._pipe is not None and bool(self._pipe.offloaded)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        settings = self.settings
        return pick_dtype(settings.dtype, pick_device(settings.device), get_spec(settings.model))

    @property
    def reader(self) -> TextReader:
        """The reader that tells which words of a prompt the model sees. The model need not be loaded."""
        if self._reader is None and self._pipe is not None:
            self._reader = TextReader(self._pipe.t5.tokenizer, self._pipe.t5.max_length)
        elif self._reader is None:
            tokenizer = find_model(self.settings, download=False).tokenizer("text_encoder_2")
            self._reader = TextReader(tokenizer, get_spec(self.settings.model).text_length)
        return self._reader

    @property
    def kept_id(self) -> str | None:
        """The id of the kept reference."""
        return self.kept.id if self.kept else None

    @property
    def running(self) -> bool:
        """Whether a run is using a model of this studio."""
        return self.memory.lock.locked()

    def load(self, opened: OpenModel) -> None:
        """Load the model from its opened files. Called by `Memory.load`."""
        self._pipe = LoadedModel.load(self.settings, opened=opened)

    def free(self) -> None:
        """Remove the model from memory, with all that belongs to it."""
        self._pipe = self.kept = self.metrics = None

    def run(
        self, work: Callable[[Progress[R]], T], stop: threading.Event
    ) -> Generator[Update[R], None, T | None]:
        """Run the work in a thread, and yield its updates; outdated ones are dropped, results never.

        Args:
            work: The work, called when the model is free.
            stop: Set to cancel the run. Closing the generator sets it too.

        Returns:
            What the work returns, or None if it was cancelled.
        """
        updates: SimpleQueue[Update[R] | None] = SimpleQueue()  # None after the last one
        done: Future[T | None] = Future()

        def in_thread() -> None:
            try:
                done.set_result(self._do(work, Progress(self.preview, stop, updates.put)))
            except BaseException as error:
                done.set_exception(error)
            updates.put(None)

        thread = threading.Thread(target=in_thread, daemon=True)
        thread.start()
        try:
            while (update := updates.get()) is not None:
                if update.result is not None or updates.empty():
                    yield update
        except GeneratorExit:
            stop.set()
            raise
        finally:
            thread.join()
        return done.result()

    def _do(self, work: Callable[[Progress[R]], T], progress: Progress[R]) -> T | None:
        """Do the work once the model is free and loaded. Return None if it is cancelled."""
        with self.memory.lock, warnings.catch_warnings():
            # They quote what the visitor typed. The page tells the visitor, nobody else.
            warnings.simplefilter("ignore", InputWarning)
            try:
                if not self.is_loaded:
                    progress.begin(f"loading {self.settings.model}", 0)
                self.memory.use(self)
                return work(progress)
            except Stopped:
                return None

    def preview(self, step: Step, width: int, height: int) -> Image.Image | None:
        """Decode the first row's predicted clean image, with sides of at most 8 * PREVIEW_SIDE pixels.

        Returns:
            The image, or None if the content filter objects to it.
        """
        latent = unpack(step.clean[:1].float(), height, width)
        shrink = min(1.0, PREVIEW_SIDE / max(latent.shape[-2:]))
        rows, columns = (max(2, 2 * round(side * shrink / 2)) for side in latent.shape[-2:])
        if shrink < 1:
            latent = F.adaptive_avg_pool2d(latent, (rows, columns))
        [image] = self.pipe.decode(pack(latent).to(self.pipe.dtype), 8 * columns, 8 * rows)
        return None if self.unsafe and self.unsafe(image) else image

    def check(self, image: Image.Image) -> Image.Image:
        """Return the image. Raise InputError if the content filter objects to it."""
        if self.unsafe and self.unsafe(image):
            raise InputError(
                "The content filter holds this image unsafe for work, so it is not shown: try another "
                "prompt or seed"
            )
        return image

    def check_file(self, path: Path) -> None:
        """Check the image in a file, and delete the file if the content filter objects.

        Raises:
            InputError: The content filter objects, or the file cannot be read.
        """
        try:
            if self.unsafe:
                self.check(read_image(path))
        except InputError:
            path.unlink()
            raise
