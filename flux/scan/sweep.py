"""The sweep: every reference image again with layers skipped (Stable Flow, section 3.1), in one folder.

    OUTPUT/run.json                        settings, versions, checkpoint
    OUTPUT/prompt_000/reference.png        the first reference
    OUTPUT/prompt_000/skip_05.png          the same with layer 5 skipped; skip_05-07.png: layers 5 and 7
    OUTPUT/grid.png                        an overview of the first references

A sweep may be stopped at any moment; started again, it resumes. `flux.scan.similarity` scores its images.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from flux.errors import InputError
from flux.images.io import read_image, save_image, thumbnail
from flux.images.sheets import grid
from flux.loaded_model import LoadedModel
from flux.runs.folder import ResumableFolder
from flux.runs.record import image_metadata
from flux.runs.workers import finish_beside, run_tasks_of
from flux.scan.layers import REFERENCE, LayerSet, layer_sets, layers_text
from flux.scan.skipper import LayerSkipper, SkipTask
from flux.settings.demos import Prompt, SkipSettings
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedSkip
from flux.specs import get_spec
from flux.weights.find import checkpoint_of, local_model
from flux.weights.open_model import OpenModel

# These may differ between the starts of one sweep, since they do not change its images.
FREE_FIELDS = {"output_dir", "batch_size", "device", "offload", "compile", "workers", "ray_address"}
OVERVIEW_ROWS, OVERVIEW_SIDE = 8, 256


def plan(settings: SkipSettings, num_layers: int) -> list[SkipTask]:
    """List the tasks of a sweep, reference by reference."""
    all_sets = [REFERENCE, *layer_sets(settings.layers, num_layers)]
    size = settings.batch_size
    return [
        SkipTask(row, entry.prompt, entry.seed, tuple(all_sets[start : start + size]))
        for row, entry in enumerate(settings.entries)
        for start in range(0, len(all_sets), size)
    ]


def image_path(folder: Path, row: int, layers: LayerSet) -> Path:
    """Return the path of the image of reference number `row` with `layers` skipped."""
    name = f"skip_{layers_text(layers)}.png" if layers else "reference.png"
    return folder / f"prompt_{row:03d}" / name


class Sweep:
    """A sweep and its folder. The images that are there already are kept.

    Args:
        settings: The settings of the sweep, or of a scan.

    Attributes:
        settings: The same settings.
        folder: The folder that the images are written to.
        layer_sets: The sets of layers to skip.
        tasks: All tasks, whether their images are there or not.
        rows_done: The number of references, from the first one on, of which all images are there.

    Raises:
        InputError: As `open_sweep`.
    """

    def __init__(self, settings: ResolvedSkip):
        self._opened = local_model(settings)
        self.settings, self.folder = settings, open_sweep(settings, self._opened)
        num_layers = get_spec(settings.model).num_layers
        self.layer_sets = layer_sets(settings.layers, num_layers)
        self.tasks = plan(settings, num_layers)
        self.rows_done = 0
        self._started, self._made_any = time.perf_counter(), False

    @property
    def num_images(self) -> int:
        """The number of images of the whole sweep."""
        return sum(len(task.layer_sets) for task in self.tasks)

    def pending(self) -> list[SkipTask]:
        """List the tasks of which images are missing."""
        return [task for task in self.tasks if self._missing(task)]

    def run(
        self,
        pipe: LoadedModel | None = None,
        on_row: Callable[[int], bool] | None = None,
        on_task: Callable[[SkipTask], None] | None = None,
        progress: bool = True,
        name: str = "skip",
    ) -> None:
        """Make the missing images.

        On a GPU, images are decoded while the next ones are denoised. They are written in a thread, one batch
        at a time. With more than one worker or a Ray address, Ray shares the work.

        Args:
            pipe: The model. If None, it is loaded once there is something to make.
            on_row: Called in order with the number of each reference whose images are all there. If it
                returns True, the sweep ends.
            on_task: Called with each task whose images are there: with those of earlier starts first, then
                with each as soon as its images are written. An exception from it ends the sweep.
            progress: Whether to show a progress bar.
            name: What to write before it.

        Raises:
            InputError: An image cannot be written, or as `LayerSkipper` or `run_tasks_of`.
        """
        _folder_of(self.folder).remove_leftovers()
        pending = self.pending()
        left = Counter(task.row for task in pending)
        total = self.num_images
        missing = sum(len(task.layer_sets) for task in pending)
        if on_task:
            still_missing = set(pending)
            for task in self.tasks:
                if task not in still_missing:
                    on_task(task)
        with (
            tqdm(total=total, initial=total - missing, desc=name, unit="image", disable=not progress) as bar,
            closing(self._written(pending, pipe)) as written,
        ):
            if self._report_rows(left, on_row):
                return
            for task in written:
                self._made_any = True
                left[task.row] -= 1
                if on_task:
                    on_task(task)
                bar.update(len(task.layer_sets))
                if self._report_rows(left, on_row):
                    return

    def finish(self) -> None:
        """Write grid.png, and run.json with the number of references and the time of this start."""
        rows = min(self.rows_done, OVERVIEW_ROWS)
        save_image(_overview(self.folder, self.settings, self.layer_sets, rows), self.folder / "grid.png")
        folder = _folder_of(self.folder)
        # The time is that of the last start that made an image.
        timings = (
            {"last_start": time.perf_counter() - self._started}
            if self._made_any
            else folder.record().get("timings")
        )
        # A model that was not here at the start has been downloaded since.
        checkpoint = self._opened.fingerprint() if self._opened else checkpoint_of(self.settings)
        folder.write_record(
            sweep_settings(self.settings), rows=self.rows_done, checkpoint=checkpoint, timings=timings
        )

    def _missing(self, task: SkipTask) -> list[int]:
        """List the places in the task's batch of the images that are not there yet."""
        paths = [image_path(self.folder, task.row, layers) for layers in task.layer_sets]
        return [place for place, path in enumerate(paths) if not path.exists()]

    def _report_rows(self, left: Counter[int], on_row: Callable[[int], bool] | None) -> bool:
        """Report the references that are complete now, and return whether the sweep is to end."""
        while self.rows_done < len(self.settings.entries) and left[self.rows_done] == 0:
            self.rows_done += 1
            if on_row and on_row(self.rows_done - 1):
                return True
        return False

    def _written(
        self, pending: Sequence[SkipTask], pipe: LoadedModel | None
    ) -> Generator[SkipTask, None, None]:
        """Yield each of these tasks once its images are written."""
        settings = self.settings
        results = run_tasks_of(settings, LayerSkipper, (pipe, self._opened), pending)

        def write(number: int, decode: Callable[[], list[Image.Image]]) -> SkipTask:
            task, images = pending[number], decode()
            for place in self._missing(task):
                layers = task.layer_sets[place]
                metadata = image_metadata(sweep_settings(settings), task.prompt, task.seed, bypassed=layers)
                save_image(images[place], image_path(self.folder, task.row, layers), metadata)
            return task

        return finish_beside(results, write)


def sweep(
    settings: ResolvedSkip,
    pipe: LoadedModel | None = None,
    progress: bool = True,
) -> Path:
    """Make each reference image, and one image for each set of skipped layers. Return the folder.

    Args:
        settings: The settings of the sweep, or of a scan.
        pipe: As for `Sweep.run`.
        progress: Whether to show a progress bar.

    Raises:
        InputError: As `open_sweep` and `Sweep.run`.
    """
    whole = Sweep(settings)
    whole.run(pipe, progress=progress)
    whole.finish()
    return whole.folder


def sweep_settings(settings: SkipSettings) -> SkipSettings:
    """Return the settings of demo 2 alone, without those that a scan has besides."""
    return SkipSettings(**{name: getattr(settings, name) for name in SkipSettings.model_fields})


def _overview(folder: Path, settings: SkipSettings, layer_sets: list[LayerSet], rows: int) -> Image.Image:
    """Draw a row of small images for each of the first references."""
    titles = ["reference", *(f"skip {layers_text(layers)}" for layers in layer_sets)]
    images = [
        [
            thumbnail(read_image(image_path(folder, row, layers)), OVERVIEW_SIDE)
            for layers in (REFERENCE, *layer_sets)
        ]
        for row in range(rows)
    ]
    return grid(images, [titles] * rows, [entry.prompt for entry in settings.entries[:rows]])


# ---- the folder


class SweepFolder(NamedTuple):
    """The contents of a finished sweep's folder.

    Attributes:
        record: The run.json.
        layer_sets: The sets of layers that were skipped.
        entries: The references that have all their images.
    """

    record: dict[str, Any]
    layer_sets: list[LayerSet]
    entries: list[Prompt]


def open_sweep(settings: SkipSettings, opened: OpenModel | None = None) -> Path:
    """Return the folder of a sweep. If it is new, its settings are left in it as run.json.

    Args:
        settings: The settings of the sweep.
        opened: The model's files, if they are open already.

    Raises:
        InputError: The folder holds a sweep that was made with other settings or other weights.
    """
    folder = _folder_of(Path(settings.output_dir))
    checkpoint = opened.fingerprint() if opened else checkpoint_of(settings)
    folder.claim(sweep_settings(settings), FREE_FIELDS, checkpoint)
    return folder.path


def read_sweep(folder: Path) -> SweepFolder:
    """Read the folder of a finished sweep.

    Raises:
        InputError: The folder holds no sweep, or one that lacks images.
    """
    record = _folder_of(folder).record()
    settings = check_settings(SkipSettings, record["settings"], folder / "run.json")
    skipped = layer_sets(settings.layers, get_spec(settings.model).num_layers)
    # A sweep that a scan ended early is complete with the rows it has.
    entries = list(settings.entries)[: record.get("rows") or len(settings.entries)]
    paths = [
        image_path(folder, row, layers) for row in range(len(entries)) for layers in (REFERENCE, *skipped)
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"Got {folder}, which lacks {len(missing)} of its {len(paths)} images "
            f"(the first: {missing[0].relative_to(folder)}): let demo_2_skip.py finish it"
        )
    return SweepFolder(record, skipped, entries)


def _folder_of(path: Path) -> ResumableFolder:
    return ResumableFolder(path, SkipSettings.demo, "a sweep", "demo_2_skip.py")
