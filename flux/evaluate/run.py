"""Methods of editing compared on a benchmark: the edits, what is measured of them, and their folder.

    OUTPUT/run.json                    settings, versions
    OUTPUT/results.csv                 one row for each item and method
    OUTPUT/METHOD/KEY.png              the edits; KEY_reference.png if the reference was generated
    OUTPUT/summary.md, summary.csv     see `flux.evaluate.summary`
    OUTPUT/sheet.png                   some of the edits

An evaluation may be stopped at any moment and started again: what is there is kept. With another judge or
other metrics its pictures are measured again, and none is made anew.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux.editing.edit import check_edits
from flux.editing.photo import Photograph
from flux.errors import InputError
from flux.evaluate.benchmark import Item, of_kinds, read_benchmark, spread
from flux.evaluate.measure import Measurer
from flux.evaluate.methods import Made, Maker
from flux.evaluate.settings import BASELINES, EvaluateSettings, Method, methods_of
from flux.evaluate.store import Store
from flux.evaluate.summary import write_standings
from flux.images.io import read_image, save_image
from flux.images.sheets import grid
from flux.pipeline import Pipeline
from flux.runs.record import about
from flux.settings.complete import complete
from flux.specs import get_spec
from flux.vital_layers import find_vital_layers
from flux.weights.find import checkpoint_of

SHEET_ROWS, SHEET_SIDE = 12, 192


@dataclass(frozen=True)
class Task:
    """Items that one method edits as a batch."""

    method: str
    items: tuple[Item, ...]


class EvaluateWorker:
    """Makes tasks, here or in a process of `flux.runs.workers.run_tasks`. Raises InputError as `Pipeline.load`."""

    def __init__(self, settings: EvaluateSettings, pipe: Pipeline | None = None):
        if pipe is None and settings.device.startswith("cuda") and shared(settings):
            # Ray shows a worker nothing but its own card, as the first.
            settings = settings.model_copy(update={"device": "cuda"})
        self.methods: dict[str, Method | None] = dict.fromkeys(BASELINES)
        self.methods |= {method.slug: method for method in completed(settings)}
        photos = settings.references == "photo"
        pipe = pipe or Pipeline.load(complete(settings))
        size = settings.width, settings.height
        self.maker = Maker(pipe, size, settings.seed, photos, settings.reconstruct)

    def run(self, task: Task) -> list[Made]:
        return self.maker.make(self.methods[task.method], task.items)


def shared(settings: EvaluateSettings) -> bool:
    """Whether the work is shared through Ray."""
    return settings.workers > 1 or settings.ray_address is not None


def completed(settings: EvaluateSettings) -> list[Method]:
    """The methods with all that the model's spec says filled in, and their layers found.

    Raises:
        InputError: as `complete`, `find_vital_layers` and `check_edits`, with the method's name.
    """
    spec, checkpoint = get_spec(settings.model), checkpoint_of(complete(settings))
    methods = []
    for method in methods_of(settings):
        try:
            own = complete(method.settings)
            layers = find_vital_layers(own.vital_layers, spec, checkpoint)
            unmasked = own.model_copy(update={"mask": None if own.mask == "given" else own.mask})
            check_edits(unmasked, layers)
        except InputError as error:
            raise InputError(f"method {method.name!r}: {error}") from error
        methods.append(replace(method, settings=own.model_copy(update={"vital_layers": layers})))
    return methods


def evaluate(settings: EvaluateSettings, pipe: Pipeline | None = None, progress: bool = True) -> Path:
    """Edits all items by all methods, measures them, and writes the folder, which it returns.

    Args:
        pipe: the model; None: loaded if there is anything left to do.

    Raises:
        InputError: as `read_benchmark`, `Store`, `Measurer` and `flux.editing.edit.edit`.
    """
    filled = complete(settings)
    settings = settings.model_copy(update={"width": filled.width, "height": filled.height})
    every = read_benchmark(settings.benchmark)
    items = spread(of_kinds(every, settings.kinds), settings.count)
    methods = completed(settings)
    store = Store(settings)
    measurer = Measurer(settings)
    if store.outdated:
        _measure_again(store, measurer, every, progress)
    store.begin()
    names = [method.slug for method in methods]
    if settings.references == "photo":
        truth = not settings.reconstruct and all(item.truth for item in items)
        names = [*(BASELINES if truth else BASELINES[:1]), *names]
    todo = _plan(items, names, settings.batch_size, store)
    left = sum(len(task.items) for task in todo)
    total = len(items) * len(names)
    bar = tqdm(total=total, initial=total - left, desc="evaluate", unit="edit", disable=not progress)

    def record(task: Task, made: list[Made]) -> None:
        for item, each in zip(task.items, made):
            more = {"method": task.method, "source": item.source}
            known = about(settings, item.target, item.seed, **more)
            save_image(each.picture, store.picture(task.method, item.key), known)
            if each.reference:
                save_image(each.reference, store.picture(task.method, item.key, reference=True), known)
        store.add(measurer.rows(task.method, task.items, made))
        bar.update(len(task.items))

    with bar, ThreadPoolExecutor(1) as recorder, closing(_made(settings, pipe, todo)) as results:
        recording = None
        for task, made in results:
            if recording:
                recording.result()
            recording = recorder.submit(record, task, made)
        if recording:
            recording.result()
    titles = {name: name for name in BASELINES} | {method.slug: method.name for method in methods}
    rows = {titles[name]: [store.rows[name, item.key] for item in items] for name in names}
    write_standings(store.folder, rows)
    save_image(_sheet(settings, store, items, names, titles), store.folder / "sheet.png")
    return store.folder


def _measure_again(store: Store, measurer: Measurer, items: Sequence[Item], progress: bool) -> None:
    """All that is there, by its pictures; written once all of it is known."""
    size, rows = store.settings.batch_size, []
    with tqdm(total=len(store.rows), desc="measure", unit="edit", disable=not progress) as bar:
        for method in dict.fromkeys(method for method, _ in store.rows):
            own = [item for item in items if (method, item.key) in store.rows]
            for start in range(0, len(own), size):
                part = own[start : start + size]
                rows += measurer.rows(method, part, [store.made(method, item.key) for item in part])
                bar.update(len(part))
    store.add(rows)


def _sheet(
    settings: EvaluateSettings,
    store: Store,
    items: Sequence[Item],
    names: Sequence[str],
    titles: dict[str, str],
) -> Image.Image:
    """The first items of each kind, a row each: what was there before, then every method's edit."""
    size = settings.width, settings.height
    shown = spread(items, SHEET_ROWS)
    pictures, captions = [], []
    for item in shown:
        references = (store.picture(name, item.key, reference=True) for name in names)
        before = next((read_image(path) for path in references if path.is_file()), None)
        row = [_small(before or item.photo(*size))]
        texts = [item.source]
        for name in names:
            row.append(_small(read_image(store.picture(name, item.key))))
            scores = store.rows[name, item.key]
            success = {None: "", 0.0: ", no", 1.0: ", yes"}[scores.get("success")]
            kept = "" if scores["psnr"] is None else f": {scores['psnr']:.1f} dB"
            texts.append(f"{titles[name]}{kept}{success}")
        pictures.append(row)
        captions.append(texts)
    return grid(pictures, captions, [f"{item.kind}: {item.target}" for item in shown])


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return picture


def _plan(items: Sequence[Item], names: Sequence[str], size: int, store: Store) -> list[Task]:
    """What is left to do, some items by all methods before the next, so that a stop leaves a fair picture."""
    tasks = []
    for start in range(0, len(items), size):
        for name in names:
            missing = [item for item in items[start : start + size] if (name, item.key) not in store.rows]
            if missing:
                tasks.append(Task(name, tuple(missing)))
    return tasks


def _made(
    settings: EvaluateSettings, pipe: Pipeline | None, todo: Sequence[Task]
) -> Iterator[tuple[Task, list[Made]]]:
    """Each task with its edits."""
    size = settings.width, settings.height
    for task in todo:
        if task.method == "truth":
            pictures = (Photograph.of(read_image(item.truth), *size).part for item in task.items)
            yield task, [Made(picture, None, 0.0, 0.0) for picture in pictures]
    todo = [task for task in todo if task.method != "truth"]
    if not todo:
        return
    if shared(settings):
        from flux.runs.workers import gpus_per_worker, run_tasks

        crew = (settings.workers, settings.ray_address, gpus_per_worker(settings.device))
        with closing(run_tasks(EvaluateWorker, (settings,), todo, *crew)) as results:
            for index, made in results:
                yield todo[index], made
        return
    worker = EvaluateWorker(settings, pipe)
    for task in todo:
        yield task, worker.run(task)
