"""The workers that Ray starts for one run, and their replacement when they die.

`ray.util.ActorPool` is not used, nor are the restarts of Ray's actors: the tasks of a worker stay with it
while Ray restarts it, and so they would wait for as long as a lost host is not replaced.
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

IN_FLIGHT = 2  # tasks that a worker holds: the next one waits there while the last one's result travels
RETRIES = 3  # times that a task is tried again, and workers in a row that may die before they have loaded
NO_WORKER_SECONDS = 60.0  # without a single worker before the run gives up
CONNECT_SECONDS = 10.0  # for a cluster's address to answer


def import_ray(workers: int) -> ModuleType:
    """Import Ray. Raise InputError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"Got workers {workers}, which share the work through Ray, and that is not installed: "
            'pip install "flux-stable-flow[cluster]"'
        ) from error
    return ray


@contextmanager
def connected(ray: ModuleType, address: str | None) -> Iterator[None]:
    """Start Ray, or connect to it, for the duration of the block.

    Raises:
        InputError: Ray does not start here, or there is no cluster at the address.
    """
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
            raise InputError(f"Ray does not start here: {_last_line(error)}") from error
        raise InputError(
            f"Got ray_address {address!r}: {_last_line(error)} (is it the address of a Ray cluster? If the "
            "cluster asks for a token, set RAY_AUTH_MODE=token in the environment)"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise InputError if nothing answers at the address.

    Ray itself would try for minutes and then end the program.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
        if address == "auto":
            return  # Ray looks on this machine, and fails at once if there is none
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    if not match:
        raise InputError(
            f'Got ray_address {address!r}, expected "auto", "HOST:PORT" or "ray://HOST:PORT" of the head of '
            "a cluster"
        )
    try:
        socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"Got ray_address {address!r}, where nothing answers ({_last_line(error)}): "
            "start the cluster there with `ray start --head`"
        ) from error


def _last_line(error: Exception) -> str:
    """Shorten an error message to its last line, which says most in Ray's long texts."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if len(lines[-1]) <= 160 else f"{lines[-1][:157]}..."


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class _WorkerProcess:
    """The actor that Ray starts for each worker.

    Its work is loaded by a method, not by the constructor: so it is known that there was room for the process
    while a model loads, however long that takes.
    """

    def __init__(self, threads: int, gpus: float):
        # Both variables are read when torch is imported, which happens in `load`.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Ray calls the methods below from several threads. The work is made and run in this one.
        self.thread = ThreadPoolExecutor(1)

    def hello(self) -> tuple[str, str]:
        return socket.gethostname(), __version__

    def load(self, make_work: Callable[..., Any], make_args: tuple[Any, ...]) -> None:
        self.work = self.thread.submit(make_work, *make_args).result()

    def run(self, task: Any) -> Any:
        result = self.thread.submit(self.work.run, task).result()
        pack = getattr(self.work, "pack", None)
        return pack(result) if pack else result


@dataclass(eq=False)
class _Worker:
    """A worker as the pool knows it.

    Attributes:
        actor: Ray's handle of a `_WorkerProcess`.
        host: The name of its machine. None until it has found room on one.
        loaded: Whether its work is loaded.
        tasks: The number of tasks that it holds.
    """

    actor: Any
    host: str | None = None
    loaded: bool = False
    tasks: int = 0


class WorkerPool:
    """The workers of one run, and the calls that they have not answered yet.

    Attributes:
        calls: For Ray's reference to each answer, the worker, and the number of the task or the method.
    """

    def __init__(
        self,
        ray: ModuleType,
        make_work: Callable[..., Any],
        make_args: tuple[Any, ...],
        size: int,
        gpus: float,
    ):
        self.ray, self.load_args, self.gpus = ray, (make_work, make_args), gpus
        self.calls: dict[Any, tuple[_Worker, int | str]] = {}
        self.workers: list[_Worker] = []
        self.failed_starts = 0
        self.last_seen = time.monotonic()  # when there was a worker
        self.last_loss: Exception | None = None
        self.threads = self._threads_per_worker(size)
        for _ in range(size):
            self._start_worker()

    def _threads_per_worker(self, size: int) -> int:
        """Divide the hosts' CPUs by the workers that have room. No more than the smallest such host has."""
        name, amount = ("GPU", self.gpus) if self.gpus else ("CPU", 1)
        hosts = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        rooms = [int(host.get(name, 0) / amount) for host in hosts]
        room = sum(rooms)
        if not room:
            raise InputError(
                f"No host of the cluster has {amount:g} {name} for a worker: add one, or ask for less"
            )
        if room < size:
            wanted = f"{size} workers want {amount:g} {name} each"
            _print(f"{wanted}, the cluster has room for {room}: goes on with {room}")
        cpus = [int(host.get("CPU", 0)) for host, places in zip(hosts, rooms) if places]
        return max(1, min(*cpus, sum(cpus) // min(size, room)))

    def _start_worker(self) -> None:
        """Ask Ray for one more worker, which starts when there is room for it."""
        options = {
            "num_gpus": self.gpus,
            "num_cpus": 0 if self.gpus else 1,
            "max_concurrency": IN_FLIGHT,
            "scheduling_strategy": "SPREAD",
        }
        actor = self.ray.remote(_WorkerProcess).options(**options).remote(self.threads, self.gpus)
        worker = _Worker(actor)
        self.workers.append(worker)
        self.calls[actor.hello.remote()] = (worker, "hello")
        self.calls[actor.load.remote(*self.load_args)] = (worker, "load")

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, its packed result), in the order of completion."""
        waiting = deque(range(len(tasks)))
        lost: Counter[int] = Counter()
        left = len(tasks)
        while left:
            answer_ref = self._next_answer()
            worker, call = self.calls.pop(answer_ref)
            try:
                answer = self.ray.get(answer_ref)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                self._replace(worker, error)
                if isinstance(call, int):
                    lost[call] += 1
                    if lost[call] > RETRIES:
                        raise InputError(
                            f"Task {call} lost its worker {lost[call]} times, so it stays undone "
                            f"({_last_line(error)})"
                        ) from error
                    waiting.appendleft(call)
                    self._assign(waiting, tasks)
                continue
            if call == "hello":
                worker.host = self._checked_host(*answer)
            elif call == "load":
                worker.loaded, self.failed_starts = True, 0
            else:
                worker.tasks -= 1
            self._assign(waiting, tasks)  # before the result is yielded: the caller may take long
            if isinstance(call, int):
                left -= 1
                yield call, answer

    def _assign(self, waiting: deque[int], tasks: Sequence[Any]) -> None:
        """Give tasks to the least busy workers.

        The last tasks are not given in advance, so that the first idle worker takes them.
        """
        loaded = [worker for worker in self.workers if worker.loaded]
        while waiting and loaded:
            worker = min(loaded, key=lambda worker: worker.tasks)
            if worker.tasks >= (IN_FLIGHT if len(waiting) > len(loaded) else 1):
                return
            number = waiting.popleft()
            self.calls[worker.actor.run.remote(tasks[number])] = (worker, number)
            worker.tasks += 1

    def _next_answer(self) -> Any:
        """Wait for the next answer and return its reference."""
        while self.workers:
            ready, _ = self.ray.wait(list(self.calls), timeout=1.0)
            if ready:
                return ready[0]
            if any(worker.host for worker in self.workers):
                self.last_seen = time.monotonic()
            elif time.monotonic() - self.last_seen > NO_WORKER_SECONDS:
                break
        reason = (
            f"the last one was lost: {_last_line(self.last_loss)}" if self.last_loss else "all are in use"
        )
        raise InputError(
            f"No worker is left, and for {NO_WORKER_SECONDS:g} s the cluster had no room for one ({reason})"
            if self.workers
            else f"No worker could start ({reason})"
        ) from self.last_loss

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Remove a worker that has died or cannot be reached, and ask for a new one."""
        if worker not in self.workers:
            return  # removed already: its other calls fail too
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        self.last_loss, self.last_seen = error, time.monotonic()
        _print(f"A worker on {worker.host or 'a host'} was lost, others go on ({_last_line(error)})")
        self.failed_starts += not worker.loaded
        if self.failed_starts <= RETRIES:
            self._start_worker()

    def _checked_host(self, host: str, version: str) -> str:
        if version != __version__:
            raise InputError(
                f"Got a worker on {host} with version {version} of this package, here it is {__version__}: "
                "install the same on each host"
            )
        return host

    def shutdown(self) -> None:
        """End the worker processes."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
