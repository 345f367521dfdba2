"""Tasks shared out over processes, cards and hosts by Ray (the extra "cluster"), which is imported only here.

`run_tasks` is for any work. On several hosts each needs this package in the same version, the same Ray and
Python, and the weights: under the same path, or from the hub. Results travel through Ray, so that no folder
is shared.
"""

import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tqdm import tqdm

from flux import __version__
from flux.errors import InputError

IN_FLIGHT = 2  # tasks given to a worker: the next one waits there while the last one's result travels
RETRIES = 3  # times that a task is tried again, and workers in a row that may die before they can work
PATIENCE = 60.0  # seconds without a single worker before the run gives up
CONNECT = 10.0  # seconds for a cluster's address to answer


def run_tasks(
    work: type | Callable[..., Any],
    make_args: tuple,
    tasks: Sequence,
    workers: int,
    ray_address: str | None = None,
    num_gpus_per_worker: float = 0,
) -> Iterator[tuple[int, Any]]:
    """Yields (number of a task, its result) in the order in which they are done, each task's once.

    Each worker, a process of its own, makes `work(*make_args)` once and calls its `run(task)` for one task
    after another, all in one thread. Whoever is free gets the next task. If the work has a `pack(result)`,
    that makes the form in which a result travels, beside the next task's `run`. All of these must be
    picklable; arrays in results are read-only and last until the generator ends.

    A task whose worker or host dies goes to another, `RETRIES` times at most; a worker that died is replaced
    as soon as there is room. An error that the work raises ends the run and is raised here.
    A caller that may stop early closes the generator (`contextlib.closing`): that stops the workers.

    Args:
        workers: at most that many at a time. If the hosts have room for fewer, one line says so, and the
            others join when a host does.
        ray_address: None starts Ray on this machine for as long as this runs; "auto" finds the cluster that
            this machine belongs to; "HOST:PORT" names its head; "ray://HOST:PORT" reaches one from outside
            and needs `pip install "ray[client]"`. To an address that is spelt out Ray shows its token only if
            the environment says RAY_AUTH_MODE=token. Where the caller has connected to Ray, that is taken.
        num_gpus_per_worker: GPUs that each worker has to itself. 0: it asks for one CPU, sees no GPU. Either
            way its share of the hosts' CPUs is the number of its threads, the same for all workers.

    Raises:
        InputError: no Ray here, no cluster at the address, no host with room for a worker, a worker with
            another version of this package, a task lost too often, or no worker left.
    """
    if not tasks:
        return
    ray = _import_ray(workers)
    with _connected(ray, ray_address):
        crew = _Crew(ray, work, make_args, min(workers, len(tasks)), num_gpus_per_worker)
        try:
            yield from crew.run(tasks)
        finally:
            crew.dismiss()


def gpus_per_worker(device: str) -> float:
    """The GPUs that a worker with these settings' device wants: 1 for CUDA, if "auto" finds it; else 0."""
    import torch

    return float(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def _import_ray(workers: int) -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"Got workers {workers}, which share the work through Ray, and that is not installed: "
            'pip install "flux-stable-flow[cluster]"'
        ) from error
    return ray


@contextmanager
def _connected(ray: ModuleType, address: str | None) -> Iterator[None]:
    """Ray runs here, or is reached, for as long as the block lasts."""
    if ray.is_initialized():
        yield
        return
    if address is not None:
        _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        if address is None:
            raise InputError(f"Ray does not start here: {_line(error)}") from error
        raise InputError(
            f"Got ray_address {address!r}: {_line(error)} (is it a Ray cluster's? One that asks for a token "
            "wants RAY_AUTH_MODE=token in the environment)"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises InputError unless something answers there: Ray itself would try for minutes, then end the
    program.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
        if address == "auto":
            return  # Ray looks on this machine, and says at once that there is none
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    if not match:
        raise InputError(
            f'Got ray_address {address!r}, expected "auto", "HOST:PORT" or "ray://HOST:PORT" of a '
            "cluster's head"
        )
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"Got ray_address {address!r}, where nothing answers ({_line(error)}): "
            "start the cluster there with `ray start --head`"
        ) from error


def _line(error: Exception) -> str:
    """The line of Ray's long texts that says most: the last one, cut to a sentence or two."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if len(lines[-1]) <= 160 else f"{lines[-1][:157]}..."


class _Process:
    """What Ray starts: the process of one worker. Empty at first, so that it is known to have found room
    before a model is loaded, however long that takes.
    """

    def __init__(self, threads: int, gpus: float):
        # Both are read when torch is imported, which happens when the work arrives.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Ray calls the methods below from several threads; the work notices only this one.
        self.thread = ThreadPoolExecutor(1)

    def arrive(self) -> tuple[str, str]:
        return socket.gethostname(), __version__

    def load(self, work: Callable, make_args: tuple) -> None:
        self.work = self.thread.submit(work, *make_args).result()

    def run(self, task: Any) -> Any:
        result = self.thread.submit(self.work.run, task).result()
        return self.work.pack(result) if hasattr(self.work, "pack") else result


@dataclass(eq=False)
class _Worker:
    """What the run knows of a worker.

    Attributes:
        host: name of its machine; None until it has found room on one.
        tasks: how many it has been given and has not answered.
    """

    actor: Any
    host: str | None = None
    loaded: bool = False
    tasks: int = 0


class _Crew:
    """The workers of one run. Each answer that is awaited stands in `awaited`: whose, and to what (the number
    of a task, or a method's name).
    """

    def __init__(self, ray: ModuleType, work: Callable, make_args: tuple, size: int, gpus: float):
        self.ray = ray
        self.load_args, self.gpus = (work, make_args), gpus
        self.awaited: dict[Any, tuple[_Worker, int | str]] = {}
        self.workers: list[_Worker] = []
        self.failed_starts = 0
        self.last_seen = time.monotonic()  # when there was a worker
        self.last_loss: Exception | None = None
        need = {"GPU": gpus} if gpus else {"CPU": 1}
        self.options = {
            "num_gpus": gpus,
            "num_cpus": need.get("CPU", 0),
            "max_concurrency": IN_FLIGHT,
            "scheduling_strategy": "SPREAD",
        }
        self.threads = self._share_of_threads(size, need)
        for _ in range(size):
            self._hire()

    def _share_of_threads(self, size: int, need: dict[str, float]) -> int:
        """CPUs of the hosts for each worker; no more than the smallest of these hosts has."""
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        rooms = [min(int(host.get(name, 0) / amount) for name, amount in need.items()) for host in alive]
        room, wanted = sum(rooms), " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        if not room:
            raise InputError(f"No host of the cluster has {wanted} for a worker: add one, or ask for less")
        if room < size:
            _tell(f"{size} workers want {wanted} each, the cluster has room for {room}: goes on with {room}")
        cpus = [int(host.get("CPU", 0)) for host, places in zip(alive, rooms) if places]
        return max(1, min(*cpus, sum(cpus) // min(size, room)))

    def _hire(self) -> None:
        """Asks for one more worker; it comes when Ray finds room for it."""
        actor = self.ray.remote(_Process).options(**self.options).remote(self.threads, self.gpus)
        worker = _Worker(actor)
        self.workers.append(worker)
        self.awaited[actor.arrive.remote()] = (worker, "arrive")
        self.awaited[actor.load.remote(*self.load_args)] = (worker, "load")

    def run(self, tasks: Sequence) -> Iterator[tuple[int, Any]]:
        queue = deque(range(len(tasks)))
        lost: Counter[int] = Counter()
        missing = len(tasks)
        while missing:
            ref = self._next_answer()
            worker, question = self.awaited.pop(ref)
            try:
                answer = self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                self._lose(worker, error)
                if isinstance(question, int):
                    lost[question] += 1
                    if lost[question] > RETRIES:
                        raise InputError(
                            f"Task {question} lost its worker {lost[question]} times, so it stays undone "
                            f"({_line(error)})"
                        ) from error
                    queue.appendleft(question)
                    self._hand_out(queue, tasks)
                continue
            if question == "arrive":
                worker.host = self._check_version(*answer)
            elif question == "load":
                worker.loaded, self.failed_starts = True, 0
            else:
                worker.tasks -= 1
            # Before the result is handed on: who takes it may take long.
            self._hand_out(queue, tasks)
            if isinstance(question, int):
                missing -= 1
                yield question, answer

    def _hand_out(self, queue: deque[int], tasks: Sequence) -> None:
        """Gives tasks to those who have least to do. The last tasks are not given ahead: whoever is free
        first shall have them.
        """
        free = [worker for worker in self.workers if worker.loaded]
        while queue and free:
            worker = min(free, key=lambda worker: worker.tasks)
            if worker.tasks >= (IN_FLIGHT if len(queue) > len(free) else 1):
                return
            number = queue.popleft()
            self.awaited[worker.actor.run.remote(tasks[number])] = (worker, number)
            worker.tasks += 1

    def _next_answer(self) -> Any:
        """Of the answers that are awaited, one that is there."""
        while self.workers:
            ready, _ = self.ray.wait(list(self.awaited), timeout=1.0)
            if ready:
                return ready[0]
            if any(worker.host for worker in self.workers):
                self.last_seen = time.monotonic()
            elif time.monotonic() - self.last_seen > PATIENCE:
                break
        because = f"the last one was lost: {_line(self.last_loss)}" if self.last_loss else "all are in use"
        raise InputError(
            f"No worker is left, and for {PATIENCE:g} s the cluster had no room for one ({because})"
            if self.workers
            else f"No worker could start ({because})"
        ) from self.last_loss

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Strikes off a worker that has died or cannot be reached, and asks for another one."""
        if worker not in self.workers:
            return  # its other answers fail too
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        self.last_loss, self.last_seen = error, time.monotonic()
        _tell(f"A worker on {worker.host or 'a host'} was lost, others go on ({_line(error)})")
        self.failed_starts += not worker.loaded
        if self.failed_starts <= RETRIES:
            self._hire()

    def _check_version(self, host: str, version: str) -> str:
        if version != __version__:
            raise InputError(
                f"Got a worker on {host} with version {version} of this package, here it is {__version__}: "
                "install the same on each host"
            )
        return host

    def dismiss(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker.actor)


def _tell(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
