"""Methods of editing compared on a benchmark: the edits, what is measured of them, and their folder.

    OUTPUT/run.json                    settings, versions
    OUTPUT/results.csv                 one row for each item and method
    OUTPUT/METHOD/KEY.png              the edits; KEY_reference.png if the reference was generated
    OUTPUT/summary.md, summary.csv     see `flux.evaluate.summary`
    OUTPUT/sheet.png                   some of the edits

An evaluation may be stopped at any moment and started again: what is there is kept. With another judge or
other metrics its pictures are measured again, and none is made anew.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flux.editing.edit import check_edits
from flux.editing.photo import Photograph
from flux.errors import InputError
from flux.evaluate.benchmark import Item, fingerprint, of_kinds, read_benchmark, spread
from flux.evaluate.methods import Made, Maker
from flux.evaluate.settings import BASELINES, EvaluateSettings, Method, methods_of
from flux.evaluate.summary import write_standings
from flux.images.io import grid, read_image, save_image, write_json, write_text
from flux.metrics.edits import NETS, OUTSIDE, Edit, EditMetrics
from flux.pipeline import Pipeline, pick_device
from flux.runs.record import about, run_record
from flux.scan.run import encoder_of
from flux.specs import complete, get_spec
from flux.vital_layers import find_vital_layers
from flux.weights.load import checkpoint_of

Row = dict[str, str | float | None]

# These may change between the starts of one evaluation: they do not change what is measured.
FREE_FIELDS = {
    "output_dir", "benchmark", "batch_size", "device", "offload", "compile", "workers", "ray_address",
    "kinds", "count", "methods", "metadata", "judge",
}  # fmt: skip
# These may as well, since all is measured again then.
MEASURED_BY = {"judge_file", "metrics", "encoder", "clip"}
TEXTS = ("item", "kind", "method")
JUDGED = ("success", "overlap")
SHEET_ROWS, SHEET_SIDE = 12, 192


def columns(settings: EvaluateSettings) -> list[str]:
    """Of results.csv."""
    nets = [column for name in settings.metrics for column in NETS[name]]
    return [*TEXTS, *(JUDGED if settings.judge else ()), *OUTSIDE, *nets, "seconds", "evaluations"]


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
        self.methods: dict[str, Method | None] = {name: None for name in BASELINES}
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


class Measurer:
    """What is known of an edit once it is made.

    Raises:
        InputError: as `EditMetrics.load`, or a judge that is not there.
    """

    def __init__(self, settings: EvaluateSettings):
        device = pick_device(settings.device)
        encoder = encoder_of(settings.encoder or settings.model)
        self.metrics = EditMetrics.load(settings.metrics, encoder, settings.clip, device)
        self.judge, self.settings = _load_judge(settings.judge, device), settings
        # Where the next edits are made meanwhile, each look at a number would wait for these.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def rows(self, method: str, items: Sequence[Item], made: Sequence[Made]) -> list[Row]:
        """The rows of results.csv for some items that one method edited."""
        with torch.cuda.stream(self.stream):
            return self._rows(method, items, made)

    def _rows(self, method: str, items: Sequence[Item], made: Sequence[Made]) -> list[Row]:
        size = self.settings.width, self.settings.height
        befores = [m.reference or item.photo(*size) for item, m in zip(items, made)]
        afters = [m.picture for m in made]
        generated = self.settings.references == "generated"
        judged, verdicts = [n for n, item in enumerate(items) if self.judge and item.asked], {}
        if judged:
            sides = ([pictures[n] for n in judged] for pictures in (befores, afters))
            verdicts = dict(zip(judged, self.judge.of(*sides, [items[n].asked for n in judged])))
        edits = []
        for n, (item, before, after) in enumerate(zip(items, befores, afters)):
            if self.settings.reconstruct:
                mask, target = np.zeros(size[::-1], dtype=bool), item.source
            elif generated:
                # Only a judge knows where its subjects are.
                mask, target = verdicts[n].mask if n in verdicts else None, item.target
            else:
                mask, target = np.asarray(item.mask(*size)), item.target
            edits.append(Edit(before, after, mask, item.source, target))
        rows = []
        for n, (item, m, scores) in enumerate(zip(items, made, self.metrics.of(edits))):
            row: Row = {"item": item.key, "kind": item.kind, "method": method, **scores}
            if n in verdicts:
                row |= {"success": float(verdicts[n].success), "overlap": verdicts[n].overlap}
            rows.append(row | {"seconds": m.seconds, "evaluations": m.evaluations})
        return rows


def _load_judge(path: str | None, device):
    if path is None:
        return None
    try:
        from training.judge import Judge
    except ImportError as error:
        raise InputError(
            f"Got the judge {path}, which takes the folder training/ of the repository: start there, or "
            "leave judge out"
        ) from error
    return Judge.load(path, device)


class Store:
    """The folder of an evaluation.

    Attributes:
        rows: of results.csv, by method and item, as far as their pictures are there.
        outdated: whether the rows there were measured by another judge or other metrics.

    Raises:
        InputError: it holds one that was made with other settings.
    """

    def __init__(self, settings: EvaluateSettings):
        self.folder, self.columns = Path(settings.output_dir), columns(settings)
        self.rows: dict[tuple[str, str], Row] = {}
        self.settings, self.outdated = settings, False
        self.generated = settings.references == "generated"
        judge = Path(settings.judge or "")
        self.record = {
            "checkpoint": checkpoint_of(complete(settings)),
            "edits": fingerprint(settings.benchmark),
            "judge_file": hashlib.sha256(judge.read_bytes()).hexdigest()[:16] if judge.is_file() else None,
        }
        if (self.folder / "run.json").exists():
            self._check()
        if (self.folder / "results.csv").exists():
            self._read()

    def begin(self) -> None:
        """Leaves its settings there, once all else that may be wrong is known to be right."""
        write_json(self.folder / "run.json", run_record(self.settings, **self.record))
        for leftover in self.folder.rglob(".flux-*.tmp"):  # of a start that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def _check(self) -> None:
        path = self.folder / "run.json"
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            fields, demo = there["settings"], there["demo"]
            earlier = [*there.get("earlier_methods", []), *fields.get("methods", [])]
            old = {method["name"]: method for method in earlier}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"Got {path}, which cannot be read as an evaluation's: {error}") from error
        own = self.settings.to_json()
        differ = {
            name for name in own.keys() | fields.keys() if own.get(name) != fields.get(name)
        } - FREE_FIELDS
        # Methods may come and go, but a name stands for one method.
        differ |= {f"method {m['name']!r}" for m in own["methods"] if old.get(m["name"], m) != m}
        differ |= {name for name, value in self.record.items() if there.get(name) != value}
        self.outdated, differ = bool(differ & MEASURED_BY), differ - MEASURED_BY
        if demo != self.settings.demo or differ:
            raise InputError(
                f"Got {self.folder}, which holds an evaluation with another {', '.join(sorted(differ))}: "
                "give another output_dir, or delete it"
            )
        # Those that are left out this time still have their rows.
        now = {method["name"] for method in own["methods"]}
        self.record["earlier_methods"] = [method for name, method in old.items() if name not in now]

    def _read(self) -> None:
        with open(self.folder / "results.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                own = (row["method"], row["item"])
                pictures = [self.picture(*own), self.picture(*own, reference=self.generated)]
                if all(picture.is_file() for picture in pictures):
                    row |= {n: float(v) if v else None for n, v in row.items() if n not in TEXTS}
                    self.rows[own] = row

    def made(self, method: str, key: str) -> Made:
        """An edit that is there."""
        row, picture = self.rows[method, key], read_image(self.picture(method, key))
        reference = read_image(self.picture(method, key, reference=True)) if self.generated else None
        return Made(picture, reference, row["seconds"], row["evaluations"])

    def picture(self, method: str, key: str, reference: bool = False) -> Path:
        return self.folder / method / (f"{key}_reference.png" if reference else f"{key}.png")

    def add(self, rows: Sequence[Row]) -> None:
        """Once their pictures are there."""
        self.rows |= {(row["method"], row["item"]): row for row in rows}
        text = StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_text(self.folder / "results.csv", text.getvalue())


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
