"""Many tasks done by the same work: one after another in this process, or shared among processes by Ray.

Ray (the extra "cluster") is imported only when it is used. On several hosts, each needs this package in the
same version, the same Ray and Python, and the weights, under the same path or from the hub. Results travel
through Ray, so the hosts need no shared folder.

`ray.util.ActorPool` is not used, nor are the restarts of Ray's actors: the tasks of a worker stay with it
while Ray restarts it, and so they would wait for as long as a lost host is not replaced.
"""

import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from flux import __version__
from flux.errors import InputError

IN_FLIGHT = 2  # tasks that a worker holds: the next one waits there while the last one's result travels
RETRIES = 3  # times that a task is tried again, and workers in a row that may die before they have loaded
NO_WORKER_SECONDS = 60.0  # without a single worker before the run gives up
CONNECT_SECONDS = 10.0  # for a cluster's address to answer

Task = TypeVar("Task")
Result = TypeVar("Result")
Finished = TypeVar("Finished")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Task_contra, Result_co]):
    """An object that does tasks, such as a loaded model.

    It may have a method `pack(result)`, which makes the form in which a result travels from one process to
    another, and then a static method `unpack(packed)`, which makes the result again.
    """

    def run(self, task: Task_contra) -> Result_co:
        """Does one task."""
        ...


def uses_ray(workers: int, ray_address: str | None) -> bool:
    """Whether these settings share their work through Ray."""
    return workers > 1 or ray_address is not None


def gpus_per_worker(device: str) -> float:
    """Returns the number of GPUs that a worker needs: 1 for CUDA, also if "auto" finds it, otherwise 0."""
    import torch

    return float(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def device_on_worker(device: str) -> str:
    """Translates a device for a Ray worker, which sees only its own GPU, as the first: "cuda:1" is "cuda"."""
    return "cuda" if device.startswith("cuda") else device


def run_tasks(
    make_work: Callable[..., Work[Task, Result]],
    make_args: tuple[Any, ...],
    tasks: Sequence[Task],
    workers: int = 1,
    ray_address: str | None = None,
    num_gpus_per_worker: float = 0,
) -> Generator[tuple[int, Result], None, None]:
    """Does the tasks, and yields (number of the task, its result) once for each, in the order of completion.

    With one worker and no address, `make_work(*make_args)` is made in this process and runs the tasks in
    order. Otherwise each worker is a process of its own, started by Ray, which makes the work once and then
    runs one task after another, all in one thread. The next task goes to an idle worker. Packing runs beside
    the next task. The work, its arguments, the tasks and the packed results must then be picklable; arrays in
    results are read-only, and valid until the generator ends.

    If a worker or its host dies, other workers do its tasks, each of which is retried up to `RETRIES` times,
    and a new worker starts as soon as there is room. An error raised by the work ends the run and is raised
    here. A caller that may stop early must close the generator (`contextlib.closing`) to stop the workers.

    Args:
        make_work: Makes the work, e.g. its class. It is not called if there are no tasks.
        make_args: The arguments of `make_work`.
        tasks: The tasks.
        workers: The largest number of workers at a time. If the hosts have room for fewer, one line says so,
            and the others join when a host does.
        ray_address: If None, Ray starts on this machine, for as long as this runs. "auto" finds the cluster
            that this machine belongs to. "HOST:PORT" names the head of a cluster. "ray://HOST:PORT" connects
            from outside, and needs `pip install "ray[client]"`. Ray sends its token to a named address only
            if the environment says RAY_AUTH_MODE=token. An existing connection to Ray is used as it is.
        num_gpus_per_worker: The number of GPUs reserved for each worker. If 0, a worker reserves one CPU and
            sees no GPU. In both cases the hosts' CPUs are divided equally into the workers' threads.

    Raises:
        InputError: Ray is not installed, there is no cluster at the address, no host has room for a worker, a
            worker has another version of this package, a task was lost too often, or no worker is left.
    """
    if not tasks:
        return
    if not uses_ray(workers, ray_address):
        work = make_work(*make_args)
        for number, task in enumerate(tasks):
            yield number, work.run(task)
        return
    ray = _import_ray(workers)
    unpack = getattr(make_work, "unpack", lambda packed: packed)
    with _connected(ray, ray_address):
        pool = _WorkerPool(ray, make_work, make_args, min(workers, len(tasks)), num_gpus_per_worker)
        try:
            for number, packed in pool.run(tasks):
                yield number, unpack(packed)
        finally:
            pool.shutdown()


def finish_beside(
    results: Generator[tuple[int, Result], None, None], finish: Callable[[int, Result], Finished]
) -> Generator[Finished, None, None]:
    """Calls `finish(number, result)` in a thread while the next result is made, and yields what it returns.

    At most one result is being finished, and its errors are raised here. Closing this generator closes
    `results`.
    """
    with closing(results), ThreadPoolExecutor(1) as thread:
        finishing: Future[Finished] | None = None
        for number, result in results:
            if finishing:
                yield finishing.result()
            finishing = thread.submit(finish, number, result)
        if finishing:
            yield finishing.result()


# ---- connecting to Ray


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
    """Starts Ray, or connects to it, for the duration of the block."""
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
    """Raises InputError if nothing answers at the address.

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
    """Shortens an error message to its last line, which says most in Ray's long texts."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if len(lines[-1]) <= 160 else f"{lines[-1][:157]}..."


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


# ---- the workers


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

    def load(self, make_work: Callable[..., Work[Any, Any]], make_args: tuple[Any, ...]) -> None:
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


class _WorkerPool:
    """The workers of one run, and the calls that they have not answered yet.

    Attributes:
        calls: For Ray's reference to each answer, the worker, and the number of the task or the method.
    """

    def __init__(
        self,
        ray: ModuleType,
        make_work: Callable[..., Work[Any, Any]],
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
        """Divides the hosts' CPUs by the workers that have room. No more than the smallest such host has."""
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
        """Asks Ray for one more worker, which starts when there is room for it."""
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
        """Gives tasks to the least busy workers.

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
        """Waits for the next answer and returns its reference."""
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
        """Removes a worker that has died or cannot be reached, and asks for a new one."""
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
        """Ends the worker processes."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
