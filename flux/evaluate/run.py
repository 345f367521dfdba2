"""Compares editing methods on a benchmark.

    OUTPUT/run.json                    settings, versions
    OUTPUT/results.csv                 one row for each item and method
    OUTPUT/METHOD/KEY.png              the edits; KEY_reference.png if the reference was generated
    OUTPUT/summary.md, summary.csv     see `flux.evaluate.summary`
    OUTPUT/sheet.png                   some of the edits

An evaluation may be stopped at any moment and resumed: finished edits are kept. With another judge or other
metrics they are measured again, but not made again.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux.editing.photo import Photograph
from flux.errors import InputError
from flux.evaluate.benchmark import Item, read_benchmark, select_evenly, select_kinds
from flux.evaluate.judge import Judge
from flux.evaluate.measure import Measurer
from flux.evaluate.methods import EditResult, MethodRunner
from flux.evaluate.resolve import (
    ResolvedEvaluate,
    ResolvedMethod,
    evaluation_warnings,
    resolve_evaluation,
    resolve_methods,
)
from flux.evaluate.settings import BASELINES, EvaluateSettings
from flux.evaluate.store import Store
from flux.evaluate.summary import ResultRow, write_summary
from flux.files import claim_folder
from flux.images.io import read_image, save_image, thumbnail
from flux.images.sheets import grid
from flux.loaded_model import LoadedModel
from flux.runs.record import image_metadata
from flux.runs.workers import finish_beside, run_tasks_of
from flux.settings.complete import resolve
from flux.weights.find import local_model
from flux.weights.open_model import OpenModel

SHEET_ROWS, SHEET_SIDE = 12, 192


def evaluate(
    settings: EvaluateSettings,
    pipe: LoadedModel | None = None,
    progress: bool = True,
    judge: Judge | None = None,
) -> Path:
    """Edit all items by all methods, measure the edits, and write the output folder.

    Args:
        settings: The settings of the evaluation.
        pipe: The loaded model. If None, it is loaded as soon as there is an edit to make.
        progress: Whether to show a progress bar.
        judge: The judge, made from the file that `settings.judge` names.

    Returns:
        The output folder.

    Raises:
        InputError: Only one of `judge` and `settings.judge` is given; also as `read_benchmark`,
            `Store`, `Measurer` and `flux.editing.edit.edit`.
    """
    _check_judge(settings, judge)
    settings = resolve_evaluation(settings)
    every = read_benchmark(settings.benchmark)
    items = select_evenly(select_kinds(every, settings.kinds), settings.count)
    settings.check_items(items)
    opened = local_model(resolve(settings))
    methods = resolve_methods(settings, opened)
    for line in evaluation_warnings(settings, methods):
        print(f"warning: {line}", file=sys.stderr)
    claim_folder(settings.output_dir)
    store = Store(settings, opened)
    measurer = Measurer(settings, judge)
    if store.outdated:
        _measure_again(store, measurer, every, progress)
    store.begin()
    titles = _titles(settings, items, methods)
    _edit_and_record(store, measurer, (pipe, opened), items, list(titles), progress)
    rows = {title: [store.rows[name, item.key] for item in items] for name, title in titles.items()}
    write_summary(store.path, rows)
    save_image(_sheet(store, items, titles), store.path / "sheet.png")
    return store.path


def _check_judge(settings: EvaluateSettings, judge: Judge | None) -> None:
    if settings.judge and judge is None:
        raise InputError(
            f"Got the judge {settings.judge}, which this command cannot load: start python -m "
            "training.evaluate_edits with the same arguments, or leave judge out"
        )
    if judge is not None and not settings.judge:
        raise InputError("Got a judge without the file it was made from: name the file in judge")


def _titles(
    settings: ResolvedEvaluate, items: Sequence[Item], methods: Sequence[ResolvedMethod]
) -> dict[str, str]:
    """Return the titles of the rows by their slugs, in order: the baselines of photographs, the methods."""
    baselines: Sequence[str] = ()
    if settings.references == "photo":
        has_truth = not settings.reconstruct and all(item.truth for item in items)
        baselines = BASELINES if has_truth else BASELINES[:1]
    return {name: name for name in baselines} | {method.slug: method.name for method in methods}


def _measure_again(store: Store, measurer: Measurer, items: Sequence[Item], progress: bool) -> None:
    """Measure all finished edits from their images, and write the rows once all of them are known."""
    size, rows = store.settings.batch_size, []
    with tqdm(total=len(store.rows), desc="measure", unit="edit", disable=not progress) as bar:
        for method in dict.fromkeys(method for method, _ in store.rows):
            own = [item for item in items if (method, item.key) in store.rows]
            for start in range(0, len(own), size):
                part = own[start : start + size]
                rows += measurer.rows(method, part, [store.result(method, item.key) for item in part])
                bar.update(len(part))
    store.add(rows)


# ---- making the edits


@dataclass(frozen=True)
class EditTask:
    """Items that one method edits as one batch."""

    method: str
    items: tuple[Item, ...]


class EvaluateWorker:
    """Runs tasks. The work of `flux.runs.workers.run_tasks_of`.

    Raises:
        InputError: As `LoadedModel.load`.
    """

    def __init__(
        self,
        settings: ResolvedEvaluate,
        pipe: LoadedModel | None = None,
        opened: OpenModel | None = None,
    ):
        self.methods: dict[str, ResolvedMethod | None] = dict.fromkeys(BASELINES)
        self.methods |= {method.slug: method for method in resolve_methods(settings, opened)}
        photos = settings.references == "photo"
        pipe = pipe or LoadedModel.load(resolve(settings), opened=opened)
        self.runner = MethodRunner(pipe, settings.size, settings.seed, photos, settings.reconstruct)

    def run(self, task: EditTask) -> list[EditResult]:
        """Make the edits of a task."""
        return self.runner.run(self.methods[task.method], task.items)


def _edit_and_record(
    store: Store,
    measurer: Measurer,
    loaded: tuple[LoadedModel | None, OpenModel | None],
    items: Sequence[Item],
    names: Sequence[str],
    progress: bool,
) -> None:
    """Make the missing edits. A thread saves and measures each batch while the next one is made.

    `loaded` are the model and its open files, if they are there.
    """
    settings = store.settings
    missing = _missing(items, names, settings.batch_size, store)
    total, left = len(items) * len(names), sum(len(task.items) for task in missing)
    bar = tqdm(total=total, initial=total - left, desc="evaluate", unit="edit", disable=not progress)

    def record(task: EditTask, results: Sequence[EditResult]) -> None:
        for item, result in zip(task.items, results):
            more = {"method": task.method, "source": item.source}
            known = image_metadata(settings, settings.prompt_of(item), item.seed, **more)
            save_image(result.image, store.image(task.method, item.key), known)
            if result.reference:
                save_image(result.reference, store.image(task.method, item.key, reference=True), known)
        store.add(measurer.rows(task.method, task.items, results))
        bar.update(len(task.items))

    with bar:
        for task in missing:
            if task.method == "truth":  # needs no model
                record(task, [_truth(settings, item) for item in task.items])
        tasks = [task for task in missing if task.method != "truth"]
        results = run_tasks_of(settings, EvaluateWorker, loaded, tasks)
        for _ in finish_beside(results, lambda number, edits: record(tasks[number], edits)):
            pass


def _missing(items: Sequence[Item], names: Sequence[str], size: int, store: Store) -> list[EditTask]:
    """Plan the edits that are missing: some items by all methods, then the next items.

    So a stopped evaluation compares the methods on the same items.
    """
    tasks = []
    for start in range(0, len(items), size):
        for name in names:
            part = [item for item in items[start : start + size] if (name, item.key) not in store.rows]
            if part:
                tasks.append(EditTask(name, tuple(part)))
    return tasks


def _truth(settings: ResolvedEvaluate, item: Item) -> EditResult:
    if item.truth is None:
        raise ValueError(f"The benchmark has no finished edit {item.key}")
    return EditResult(Photograph.of(read_image(item.truth), *settings.size).part, None, 0.0, 0.0)


# ---- the sheet


def _sheet(store: Store, items: Sequence[Item], titles: Mapping[str, str]) -> Image.Image:
    """Draw the first items of each kind, a row each: the image before, then each method's edit."""
    shown = select_evenly(items, SHEET_ROWS)
    images, captions = [], []
    for item in shown:
        references = (store.image(name, item.key, reference=True) for name in titles)
        before = next((read_image(path) for path in references if path.is_file()), None)
        edits = [store.read(name, item.key) for name in titles]
        images.append(
            [thumbnail(image, SHEET_SIDE) for image in (before or item.photo(*store.settings.size), *edits)]
        )
        texts = [_caption(title, store.rows[name, item.key]) for name, title in titles.items()]
        captions.append([item.source, *texts])
    return grid(images, captions, [f"{item.kind}: {store.settings.prompt_of(item)}" for item in shown])


def _caption(title: str, row: ResultRow) -> str:
    success, psnr = row.scores.get("success"), row.scores["psnr"]
    verdict = "" if success is None else ", yes" if success else ", no"
    return f"{title}{'' if psnr is None else f': {psnr:.1f} dB'}{verdict}"
