"""Many tasks done by the same work: one after another in this process, or shared among processes by Ray.

Ray (the extra "cluster") is imported only when it is used. On several hosts, each needs this package in the
same version, the same Ray and Python, and the weights, under the same path or from the hub. Results travel
through Ray, so the hosts need no shared folder.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol, TypeVar

from flux.runs.ray_pool import WorkerPool, connected, import_ray
from flux.settings.demos import Shareable

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
        """Do one task."""
        ...


def uses_ray(workers: int, ray_address: str | None) -> bool:
    """Whether these settings share their work through Ray."""
    return workers > 1 or ray_address is not None


def gpus_per_worker(device: str) -> float:
    """Return the number of GPUs that a worker needs: 1 for CUDA, also if "auto" finds it, otherwise 0."""
    import torch

    return float(device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def device_on_worker(device: str) -> str:
    """Translate a device for a Ray worker, which sees only its own GPU, as the first: "cuda:1" is "cuda"."""
    return "cuda" if device.startswith("cuda") else device


def run_tasks(
    make_work: Callable[..., Work[Task, Result]],
    make_args: tuple[Any, ...],
    tasks: Sequence[Task],
    workers: int = 1,
    ray_address: str | None = None,
    num_gpus_per_worker: float = 0,
) -> Generator[tuple[int, Result], None, None]:
    """Do the tasks, and yield (number of the task, its result) once for each, in the order of completion.

    With one worker and no address, `make_work(*make_args)` is made in this process and runs the tasks in
    order. Otherwise each worker is a process of its own, started by Ray, which makes the work once and then
    runs one task after another, all in one thread. The next task goes to an idle worker. Packing runs beside
    the next task. The work, its arguments, the tasks and the packed results must then be picklable; arrays in
    results are read-only, and valid until the generator ends.

    If a worker or its host dies, other workers do its tasks, each of which is retried up to
    `flux.runs.ray_pool.RETRIES` times, and a new worker starts as soon as there is room. An error raised by
    the work ends the run and is raised here. A caller that may stop early must close the generator
    (`contextlib.closing`) to stop the workers.

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
    ray = import_ray(workers)
    unpack = getattr(make_work, "unpack", lambda packed: packed)
    with connected(ray, ray_address):
        pool = WorkerPool(ray, make_work, make_args, min(workers, len(tasks)), num_gpus_per_worker)
        try:
            for number, packed in pool.run(tasks):
                yield number, unpack(packed)
        finally:
            pool.shutdown()


def run_tasks_of(
    settings: Shareable,
    make_work: Callable[..., Work[Task, Result]],
    loaded: tuple[Any, ...],
    tasks: Sequence[Task],
) -> Generator[tuple[int, Result], None, None]:
    """Do the tasks of a run with as many workers as its settings name, otherwise as `run_tasks`.

    Args:
        settings: The settings, the first argument of `make_work`.
        make_work: Makes the work, e.g. its class.
        loaded: Its other arguments, in this process. A Ray worker loads its own.
        tasks: The tasks.

    Raises:
        InputError: As `run_tasks`.
    """
    if not uses_ray(settings.workers, settings.ray_address):
        return run_tasks(make_work, (settings, *loaded), tasks)
    on_worker = settings.model_copy(update={"device": device_on_worker(settings.device)})
    workers = settings.workers, settings.ray_address, gpus_per_worker(settings.device)
    return run_tasks(make_work, (on_worker,), tasks, *workers)


def finish_beside(
    results: Generator[tuple[int, Result], None, None], finish: Callable[[int, Result], Finished]
) -> Generator[Finished, None, None]:
    """Call `finish(number, result)` in a thread while the next result is made, and yield what it returns.

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
