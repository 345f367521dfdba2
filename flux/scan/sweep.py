"""Which layers matter: the sweep that bypasses each during sampling (Stable Flow, section 3.1), and its
folder.

`sweep` writes a folder of pictures, and may be stopped at any moment and started again. `flux.scan.scores` reads
them.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux.errors import InputError
from flux.files import write_json
from flux.images.io import read_image, save_image
from flux.images.sheets import grid
from flux.intervention import Intervention
from flux.pipeline import Pipeline
from flux.runs.record import about, run_record
from flux.sampling import Conditioning, Streams, euler_step, sample, streams
from flux.settings.demos import Prompt, SkipSettings
from flux.settings.files import check_settings
from flux.specs import get_spec
from flux.weights.find import checkpoint_of

LayerSet = tuple[int, ...]
REFERENCE: LayerSet = ()

# These may change between the starts of one sweep: they do not change its pictures.
FREE_FIELDS = {"output_dir", "batch_size", "device", "offload", "compile", "workers", "ray_address"}
OVERVIEW_ROWS, OVERVIEW_SIDE = 8, 256


def layer_sets(layers: str | Sequence[int] | Sequence[Sequence[int]], num_layers: int) -> list[LayerSet]:
    """The sets to bypass: "all" layers one by one, those of a list one by one, or each list of a list."""
    if layers == "all":
        layers = range(num_layers)
    return [(entry,) if isinstance(entry, int) else tuple(sorted(entry)) for entry in layers]


def layers_text(layers: LayerSet) -> str:
    """ "05-07" for layers 5 and 7, as in file names."""
    return "-".join(f"{layer:02d}" for layer in layers)


def picture_path(folder: Path, row: int, layers: LayerSet) -> Path:
    """Where a sweep keeps the picture of its reference number `row` with `layers` bypassed."""
    name = f"skip_{layers_text(layers)}.png" if layers else "reference.png"
    return folder / f"prompt_{row:03d}" / name


@dataclass(frozen=True)
class Task:
    """Pictures that are made as one batch: one prompt and seed, a set of layers bypassed in each row.

    The pictures depend on the task and the settings alone, not on what was made before or by whom: a batch
    that was only half written is made again as a whole.
    """

    row: int
    prompt: str
    seed: int
    sets: tuple[LayerSet, ...]


def plan(settings: SkipSettings, num_layers: int) -> list[Task]:
    """All tasks of a sweep, reference by reference."""
    sets = [REFERENCE, *layer_sets(settings.layers, num_layers)]
    size = settings.batch_size
    return [
        Task(row, entry.prompt, entry.seed, tuple(sets[start : start + size]))
        for row, entry in enumerate(settings.entries)
        for start in range(0, len(sets), size)
    ]


class Bypasser:
    """Makes the pictures of tasks, and remembers for one prompt and seed what its tasks have in common."""

    def __init__(self, pipe: Pipeline, settings: SkipSettings):
        self.pipe, self.settings = pipe, settings
        self.beside = decodes_beside(pipe)
        # On the stream of the steps, a picture would wait for those of the next ones.
        own = self.beside and pipe.device.type == "cuda"
        self._stream = torch.cuda.Stream(pipe.device) if own else None
        self._key: tuple[str, int] | None = None
        self._cond: Conditioning | None = None
        self._streams: list[tuple[Streams, Streams | None]] = []

    def make(self, task: Task) -> list[Image.Image]:
        """The task's pictures, in the order of its sets."""
        return self.denoise(task)()

    def denoise(self, task: Task) -> Callable[[], list[Image.Image]]:
        """Takes the task's steps. What it returns gives the pictures, and may be called in another thread,
        while the next task is denoised.
        """
        decode = partial(self._decode, self._denoise(task))
        if self.beside:
            return decode
        pictures = decode()
        return lambda: pictures

    def _denoise(self, task: Task) -> Tensor:
        pipe, settings = self.pipe, self.settings
        width, height, batch = settings.width, settings.height, len(task.sets)
        levels = pipe.schedule(settings.num_steps, width, height)
        noise = pipe.noise([task.seed], width, height)
        if self._key != (task.prompt, task.seed):
            self._begin(task, noise, levels)
        cond, latent = self._cond.expanded(batch), noise.expand(batch, -1, -1)
        ids = pipe.image_ids(batch, width, height)
        skip = tuple(frozenset(layers) for layers in task.sets)
        intervention = Intervention(skip=skip, scale=settings.scale)
        with pipe.denoising() as model:
            # Below the first bypassed layer, the first step is the reference's own.
            start = self._streams[min((min(layers) for layers in task.sets if layers), default=0)]
            latent = euler_step(model, latent, ids, cond, *levels[:2], intervention, start).latent
            for step in sample(model, latent, ids, cond, levels[1:], intervention):
                latent = step.latent
        return latent

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        settings = self.settings
        with torch.cuda.stream(self._stream):
            return self.pipe.decode(latents, settings.width, settings.height, settings.watermark)

    def _begin(self, task: Task, noise, levels: list[float]) -> None:
        settings = self.settings
        # The last prompt's streams make room first: those of all layers are many.
        self._key, self._streams = None, []
        cond = self.pipe.condition(
            [task.prompt], settings.guidance, settings.true_cfg, settings.negative_prompt
        )
        ids = self.pipe.image_ids(1, settings.width, settings.height)
        with self.pipe.denoising() as model:
            self._cond = cond.scheduled(model, levels[:-1])
            self._streams = streams(model, noise, ids, self._cond, levels[0])
        self._key = (task.prompt, task.seed)


def decodes_beside(pipe: Pipeline) -> bool:
    """Whether pictures are decoded while the next ones are denoised: on a GPU with room for all nets.

    On two CPU cores, of which each net takes both, a sweep would take a third longer.
    """
    return pipe.device.type == "cuda" and not pipe.offloaded


class SweepWorker:
    """A `Bypasser` for `flux.runs.workers.run_tasks`: its pictures travel as PNG files.

    Raises:
        InputError: as `Pipeline.load`.
    """

    def __init__(self, settings: SkipSettings):
        if settings.device.startswith("cuda"):
            # Ray shows a worker nothing but its own card, as the first.
            settings = settings.model_copy(update={"device": "cuda"})
        self.bypasser = Bypasser(Pipeline.load(settings), settings)

    def run(self, task: Task) -> Callable[[], list[Image.Image]]:
        return self.bypasser.denoise(task)

    @staticmethod
    def pack(decode: Callable[[], list[Image.Image]]) -> list[bytes]:
        pictures = decode()
        files = [BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files):
            # Six times as fast as pillow's default, for files a sixth larger, which only travel.
            picture.save(file, "PNG", compress_level=1)
        return [file.getvalue() for file in files]

    @staticmethod
    def unpack(files: list[bytes]) -> list[Image.Image]:
        return [Image.open(BytesIO(file)).convert("RGB") for file in files]


def open_sweep(settings: SkipSettings) -> Path:
    """The folder of a sweep, its settings left in it as run.json if it is new.

    Raises:
        InputError: the folder holds a sweep made with other settings or other weights.
    """
    folder, checkpoint = Path(settings.output_dir), checkpoint_of(settings)
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", run_record(sweep_part(settings), checkpoint=checkpoint))
        return folder
    record = read_sweep(folder)
    own, there = sweep_part(settings).to_json(), record["settings"]
    names = (own.keys() | there.keys()) - FREE_FIELDS
    differ = {name for name in names if own.get(name) != there.get(name)}
    # The same name may stand for another file by now.
    known = record.get("checkpoint")
    if checkpoint and known and checkpoint != known:
        differ.add("weights")
    if differ:
        raise InputError(
            f"Got {folder}, which holds a sweep made with another {', '.join(sorted(differ))}: "
            "give another output_dir, or delete it"
        )
    return folder


def sweep_part(settings: SkipSettings) -> SkipSettings:
    """The settings of demo 2 alone, where more are given."""
    return SkipSettings(**{name: getattr(settings, name) for name in SkipSettings.model_fields})


def sweep(
    settings: SkipSettings,
    pipe: Pipeline | None = None,
    on_row: Callable[[int], bool] | None = None,
    progress: bool = True,
    on_task: Callable[[Task], None] | None = None,
) -> Path:
    """Writes each reference and a picture of it for each set of layers bypassed. Returns the folder.

    Pictures that are there already are kept, so that a sweep that was stopped goes on where it was. Pictures
    are written, and on a GPU decoded, beside the denoiser, in a thread, one batch at a time. With more than
    one worker or a Ray address, the work is shared through `flux.runs.workers`.

    Args:
        settings: complete ones (`flux.settings.complete.resolve`).
        pipe: the model; None: loaded if there is anything left to do.
        on_row: told, in order, each reference whose pictures are all there; if it says True, that was the
            last one.
        on_task: told each task whose pictures have just been written; an exception from it ends the sweep.

    Raises:
        InputError: as `open_sweep`, or a picture cannot be written.
    """
    begin, folder = time.perf_counter(), open_sweep(settings)
    for leftover in folder.rglob(".flux-*.tmp"):  # of a start that was killed while it wrote
        leftover.unlink(missing_ok=True)
    num_layers = get_spec(settings.model).num_layers
    tasks = plan(settings, num_layers)
    todo = [task for task in tasks if _missing(folder, task)]
    left = [sum(task.row == row for task in todo) for row in range(len(settings.entries))]
    rows_done = 0

    def rows_told() -> bool:
        """Tells `on_row` of rows that are complete now; whether it has had enough."""
        nonlocal rows_done
        while rows_done < len(left) and left[rows_done] == 0:
            rows_done += 1
            if on_row and on_row(rows_done - 1):
                return True
        return False

    total = sum(len(task.sets) for task in tasks)
    begun = total - sum(len(task.sets) for task in todo)
    with tqdm(total=total, initial=begun, desc="bypass", unit="image", disable=not progress) as bar:
        enough = rows_told()
        with closing(_finished(settings, pipe, [] if enough else todo, folder)) as finished:
            for task in finished:
                left[task.row] -= 1
                if on_task:
                    on_task(task)
                bar.update(len(task.sets))
                if rows_told():
                    break
    rows = min(rows_done, OVERVIEW_ROWS)
    save_image(
        _overview(folder, settings, layer_sets(settings.layers, num_layers), rows), folder / "grid.png"
    )
    # Of the last start that made anything.
    timings = (
        {"last_start": time.perf_counter() - begin} if bar.n > begun else read_sweep(folder).get("timings")
    )
    more = {"rows": rows_done, "checkpoint": checkpoint_of(settings), "timings": timings}
    write_json(folder / "run.json", run_record(sweep_part(settings), **more))
    return folder


def _missing(folder: Path, task: Task) -> list[int]:
    """Which of the task's pictures are not there yet."""
    return [i for i, layers in enumerate(task.sets) if not picture_path(folder, task.row, layers).exists()]


def _finished(
    settings: SkipSettings, pipe: Pipeline | None, todo: list[Task], folder: Path
) -> Iterator[Task]:
    """Yields each task when its pictures have been written."""

    def write(task: Task, decode: Callable[[], list[Image.Image]]) -> Task:
        pictures = decode()
        for i in _missing(folder, task):
            more = about(sweep_part(settings), task.prompt, task.seed, bypassed=task.sets[i])
            save_image(pictures[i], picture_path(folder, task.row, task.sets[i]), more)
        return task

    if not todo:
        return
    if settings.workers > 1 or settings.ray_address:
        from flux.runs.workers import gpus_per_worker, run_tasks

        shared = (settings.workers, settings.ray_address, gpus_per_worker(settings.device))
        with closing(run_tasks(SweepWorker, (settings,), todo, *shared)) as results:
            for index, files in results:
                yield write(todo[index], partial(SweepWorker.unpack, files))
        return
    bypasser = Bypasser(pipe or Pipeline.load(settings), settings)
    with ThreadPoolExecutor(1) as beside:
        finishing: Future | None = None
        for task in todo:
            decode = bypasser.denoise(task)
            if finishing:
                yield finishing.result()
            finishing = beside.submit(write, task, decode)
        yield finishing.result()


def _overview(folder: Path, settings: SkipSettings, sets: list[LayerSet], rows: int) -> Image.Image:
    """A row of small pictures for each of the first references."""
    titles = ["reference", *(f"without {layers_text(layers)}" for layers in sets)]
    pictures = [
        [_small(picture_path(folder, row, layers)) for layers in (REFERENCE, *sets)] for row in range(rows)
    ]
    return grid(pictures, [titles] * rows, [entry.prompt for entry in settings.entries[:rows]])


def _small(path: Path) -> Image.Image:
    picture = read_image(path)
    picture.thumbnail((OVERVIEW_SIDE, OVERVIEW_SIDE))
    return picture


def read_sweep(folder: Path) -> dict:
    """The run.json of a sweep's folder. Raises InputError if it has none."""
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(
            f"Got {folder}, which holds no run.json of demo_2_skip.py: give the folder that it wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["demo"] != SkipSettings.demo:
            raise InputError(
                f"Got {folder}, which demo {record['demo']!r} wrote: give a folder of demo_2_skip.py"
            )
        record["settings"]["prompts"], record["settings"]["layers"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Got {path}, which cannot be read as a sweep's: {error}") from error
    return record


def check_sweep(folder: Path) -> tuple[dict, list[LayerSet], list[Prompt]]:
    """A finished sweep's run.json, its sets of layers, and the references it has pictures of.

    Raises:
        InputError: no sweep, or one that lacks pictures.
    """
    record = read_sweep(folder)
    settings = check_settings(SkipSettings, record["settings"], folder / "run.json")
    sets = layer_sets(settings.layers, get_spec(settings.model).num_layers)
    # A sweep that was told to stop early is whole with the rows it has.
    entries = list(settings.entries)[: record.get("rows") or len(settings.entries)]
    paths = [
        picture_path(folder, row, layers) for row in range(len(entries)) for layers in (REFERENCE, *sets)
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"Got {folder}, which lacks {len(missing)} of its {len(paths)} pictures "
            f"(the first: {missing[0].relative_to(folder)}): let demo_2_skip.py finish it"
        )
    return record, sets, entries
