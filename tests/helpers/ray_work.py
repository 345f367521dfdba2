"""Work for Ray's workers, whose processes import this file: heavy things are imported where they are used."""

import os
import threading
import time
from pathlib import Path

from flux.errors import InputError
from helpers.waiting import until

# A host of a cluster, as Ray's tests start it.
HOST = {
    "num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20, "wait": False
}  # fmt: skip


class Toy:
    """Squares numbers and says in which process; what else it does is in the task."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        (folder / f"worker_{os.getpid()}").touch() if folder else None

    def run(self, task: dict) -> tuple[int, int]:
        time.sleep(task.get("seconds", 0.0))
        for kind in {"worker", "done"} & task.keys():
            until(lambda kind=kind: len(list(self.folder.glob(f"{kind}_*"))) >= task[kind])
        if "die_once" in task and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        if "die" in task:
            os._exit(1)
        if "wrong" in task:
            raise task["wrong"]
        (self.folder / f"done_{task['number']}").touch() if self.folder else None
        return task["number"] ** 2, os.getpid()


class Packing:
    """The first two results are packed only when the next task has begun."""

    def __init__(self):
        self.thread, self.begun = threading.get_ident(), 0

    def run(self, task: int) -> tuple[int, bool]:
        self.begun += 1
        return self.begun, threading.get_ident() == self.thread

    def pack(self, result: tuple[int, bool]) -> tuple[bool, str]:
        number, own_thread = result
        until(lambda: self.begun > min(number, 2))
        return own_thread, "packed"


class Surroundings:
    """Says which GPUs and how many threads its process may use."""

    def run(self, task: None) -> tuple:
        return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


class Stillborn:
    """Its process ends before it is made."""

    def __init__(self):
        os._exit(1)


class Picky:
    """Refuses its file."""

    def __init__(self, weights: str):
        raise InputError(f"no file {weights}")
