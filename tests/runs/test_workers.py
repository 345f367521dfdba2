"""Tasks shared out by Ray over the two hosts of a cluster on this machine, whose processes and hosts die.

This file is imported by the workers too: heavy things are imported where they are used.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flux.errors import InputError
from flux.runs import workers
from flux.runs.workers import run_tasks

# One test of the whole runs by default; the others together take a minute, and more on a busy machine.
slow = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
HOST = {
    "num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20, "wait": False
}  # fmt: skip
WAIT = 240  # seconds for what must come to pass, however busy the machine is
# On a busy machine a process that is slow is not dead; one that is, is known to be so soon.
PATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": f"{WAIT}000",
    "RAY_worker_register_timeout_seconds": f"{WAIT}",
    "RAY_gcs_server_request_timeout_seconds": f"{WAIT}",
    "RAY_gcs_rpc_server_connect_timeout_s": f"{WAIT}",
    "RAY_gcs_server_port_wait_time_s": f"{WAIT}",
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Workers find this file, nobody is told of the tests, and no cluster of the person's own is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent))))
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **PATIENT}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def hosts(environment):
    """A cluster of two hosts with one CPU each; the tests' own process joins the first."""
    from ray.cluster_utils import Cluster

    hosts = Cluster(initialize_head=True, head_node_args=HOST)
    yield hosts
    hosts.shutdown()


@pytest.fixture
def two_hosts(hosts):
    """That cluster, whole again after a test that took a host away."""
    if not hosts.worker_nodes:
        hosts.add_node(**HOST)
    hosts.wait_for_nodes(timeout=WAIT)
    return hosts


def until(condition: Callable[[], bool]) -> None:
    """Waits for what other processes do: however slow the machine is, the order of things is the same."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


class Toy:
    """Squares numbers and says in which process; what else it does is in the task."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        (folder / f"worker_{os.getpid()}").touch() if folder else None

    def run(self, task: dict) -> tuple[int, int]:
        time.sleep(task.get("seconds", 0.0))
        for kind in {"worker", "done"} & task.keys():
            until(lambda: len(list(self.folder.glob(f"{kind}_*"))) >= task[kind])
        if "die_once" in task and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        if "die" in task:
            os._exit(1)
        if "wrong" in task:
            raise task["wrong"]
        (self.folder / f"done_{task['number']}").touch() if self.folder else None
        return task["number"] ** 2, os.getpid()


def numbers(count: int, **more) -> list[dict]:
    return [{"number": number, **more} for number in range(count)]


def squares(results) -> dict[int, int]:
    """Number of each task -> its square; no task twice."""
    results = list(results)
    found = {number: square for number, (square, _) in results}
    assert len(found) == len(results)
    return found


def expected(count: int) -> dict[int, int]:
    return {number: number**2 for number in range(count)}


# ---- sharing out


@slow
def test_all_results_and_each_worker_loads_once(two_hosts, tmp_path):
    results = list(run_tasks(Toy, (tmp_path,), numbers(12, worker=2), 2, two_hosts.address))
    assert squares(results) == expected(12)
    workers = {path.name for path in tmp_path.glob("worker_*")}
    assert {f"worker_{process}" for _, (_, process) in results} == workers
    assert len(workers) == 2


@slow
def test_whoever_is_free_gets_the_next_task(two_hosts, tmp_path):
    """While one worker has a long task, the other does all the rest but the one already given: the long one
    waits for these.
    """
    tasks = [{"number": 0, "done": 7}, *numbers(9, worker=2)[1:]]
    results = list(run_tasks(Toy, (tmp_path,), tasks, 2, two_hosts.address))
    assert squares(results) == expected(9)
    slow = dict(results)[0][1]
    assert sum(process == slow for _, (_, process) in results) <= 2


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


@slow
def test_packing_does_not_hold_up_the_next_task(two_hosts):
    """All work is in the thread that made it, and packing in another."""
    results = dict(run_tasks(Packing, (), range(4), 1, two_hosts.address))
    assert results == dict.fromkeys(range(4), (True, "packed"))


class Surroundings:
    def run(self, task: None) -> tuple:
        return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


@slow
def test_each_worker_has_its_own_gpu_or_none(two_hosts):
    """As Ray counts them: these hosts only say that they have one each."""
    for gpus, seen in ((1, "0"), (0, "")):
        results = run_tasks(Surroundings, (), [None] * 4, 2, two_hosts.address, gpus)
        assert {result for _, result in results} == {(seen, "1")}


def test_no_tasks_need_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(run_tasks(Toy, (), [], 2)) == []


# ---- deaths


@slow
def test_a_task_whose_worker_died_is_done_by_another(two_hosts, tmp_path, capfd):
    tasks = numbers(10)
    tasks[4]["die_once"] = True
    assert squares(run_tasks(Toy, (tmp_path,), tasks, 2, two_hosts.address)) == expected(10)
    assert (tmp_path / "died").exists()
    assert len(list(tmp_path.glob("worker_*"))) >= 2
    assert "was lost, others go on" in capfd.readouterr().err


@slow
def test_a_task_that_kills_each_worker_ends_the_run(two_hosts):
    tasks = numbers(4)
    tasks[1]["die"] = True
    with pytest.raises(InputError, match=r"Task \d lost its worker 4 times"):
        list(run_tasks(Toy, (), tasks, 1, two_hosts.address))


@slow
def test_a_host_lost_mid_way_and_a_new_one(two_hosts, tmp_path, capfd):
    """The host that is left does what the lost one was to do, until another takes its place."""
    [host] = two_hosts.worker_nodes
    results, alone = {}, False
    tasks = [*numbers(8, worker=2), *numbers(20_000, seconds=0.05)[8:]]
    with closing(run_tasks(Toy, (tmp_path,), tasks, 2, two_hosts.address)) as answers:
        for number, (square, process) in answers:
            assert number not in results
            assert square == number**2
            results[number] = process
            if len(results) == 6:
                two_hosts.remove_node(host, allow_graceful=False)
            # The lost host's worker lives a moment longer.
            if len(results) > 20 and not alone and len(set(list(results.values())[-12:])) == 1:
                alone = True
                two_hosts.add_node(**HOST)
            if len(set(results.values())) == 3:
                break
    assert alone
    assert len(set(results.values())) == 3
    # None was passed over: of those given out, only the last few were under way.
    assert set(range(len(results) - 5)) <= results.keys()
    assert capfd.readouterr().err.count("was lost, others go on") == 1


class Stillborn:
    def __init__(self):
        os._exit(1)


@slow
def test_workers_that_all_die_at_the_start(two_hosts):
    """They are not replaced for ever."""
    with pytest.raises(InputError, match="No worker could start .the last one was lost"):
        list(run_tasks(Stillborn, (), [1, 2, 3], 2, two_hosts.address))


# ---- errors


@slow
@pytest.mark.parametrize("wrong", [InputError("got 3, expected 4"), ZeroDivisionError("by zero")], ids=repr)
def test_an_error_of_a_task_ends_the_run(two_hosts, wrong, capfd):
    """As it was raised, for the user one line; Ray's own with the worker's traceback is its cause."""
    tasks = numbers(6)
    tasks[2]["wrong"] = wrong
    with pytest.raises(type(wrong)) as caught:
        list(run_tasks(Toy, (), tasks, 1, two_hosts.address))
    assert str(caught.value) == str(wrong)
    assert type(caught.value) is type(wrong)
    assert "in run" in str(caught.value.__cause__)
    assert "was lost" not in capfd.readouterr().err


class Picky:
    def __init__(self, weights: str):
        raise InputError(f"no file {weights}")


@slow
def test_an_error_of_the_work_at_the_start(two_hosts):
    with pytest.raises(InputError, match="^no file x.safetensors$"):
        list(run_tasks(Picky, ("x.safetensors",), [1], 1, two_hosts.address))


@slow
def test_more_workers_than_there_is_room_for(two_hosts, capfd):
    """Those for which there is room do it; where there is none for a single one it is said at once."""
    assert squares(run_tasks(Toy, (), numbers(8), 5, two_hosts.address)) == expected(8)
    assert "5 workers want 1 CPU each, the cluster has room for " in capfd.readouterr().err
    with pytest.raises(InputError, match="No host of the cluster has 2 GPU for a worker"):
        list(run_tasks(Toy, (), numbers(2), 2, two_hosts.address, num_gpus_per_worker=2))


@slow
def test_a_cluster_that_others_use(two_hosts, monkeypatch):
    """A run that finds no room for a single worker gives up."""
    import ray

    monkeypatch.setattr(workers, "NO_WORKER_SECONDS", 1.0)
    ray.init(address=two_hosts.address, log_to_driver=False, logging_level="ERROR")
    try:
        others = [ray.remote(num_cpus=1)(Toy).remote() for _ in range(2)]
        ray.get([other.run.remote({"number": 1}) for other in others])
        with pytest.raises(InputError, match="No worker is left.*no room for one .all are in use"):
            list(run_tasks(Toy, (), numbers(2), 2))
        assert ray.is_initialized()  # it was connected before, so it stays
    finally:
        ray.shutdown()


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"workers 4.*pip install .flux-stable-flow\[cluster\]"):
        next(run_tasks(Toy, (), numbers(2), 4))


def test_addresses_without_a_cluster(monkeypatch):
    """Found out before Ray is asked, which would take minutes and then end the program."""
    import ray

    monkeypatch.setattr(workers, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asked Ray"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for address, told in {
            f"127.0.0.1:{port}": "nothing answers",
            f"ray://127.0.0.1:{port}": "nothing answers",
            "no-such-host.invalid:6379": "nothing answers",
            "127.0.0.1:99999": "nothing answers",
            "somewhere": "expected",
            "http://127.0.0.1:80/x": "expected",
        }.items():
            with pytest.raises(InputError, match=f"Got ray_address {address!r}.*{told}"):
                next(run_tasks(Toy, (), numbers(2), 2, address))


@slow
def test_another_version_on_a_host(two_hosts, monkeypatch):
    monkeypatch.setattr(workers, "__version__", "0.0.0")
    with pytest.raises(InputError, match="Got a worker on .* here it is 0.0.0: install the same"):
        list(run_tasks(Toy, (), numbers(2), 1, two_hosts.address))


@slow
def test_a_ray_of_its_own_and_ctrl_c(tmp_path):
    """Without an address Ray runs as long as the tasks; Ctrl-C: one line, status 130, no process stays."""
    script = tmp_path / "sleepers.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from contextlib import closing
        from flux.runs.workers import run_tasks
        from flux.errors import exit_on_input_error

        class Sleeper:
            def run(self, task):
                time.sleep(task)
                return os.getpid()

        if __name__ == "__main__":
            with exit_on_input_error(), closing(run_tasks(Sleeper, (), [0, 60, 60], 2)) as results:
                for _, process in results:
                    print(process, flush=True)
        """)
    )
    program = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HOME": str(tmp_path)}, start_new_session=True,
        # Else ignored, where the tests were started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    processes = [int(program.stdout.readline())]  # the worker, and of which it is a child
    while processes[-1] != program.pid:
        status = Path(f"/proc/{processes[-1]}/status").read_text()
        processes.append(int(status.split("PPid:")[1].split()[0]))
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does it: to all processes of the program
    output, errors = program.communicate(timeout=WAIT)
    assert (program.returncode, output, errors) == (130, "", "\nstopped; what was already written stays\n")
    assert len(processes) >= 3
    until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


# ---- the sweep


SWEEP = {
    "prompts": ["a dog on the grass", {"prompt": "a red car on the street", "seed": 9}],
    "layers": [0, 5, 12],
    "batch_size": 2,
    "width": 64,
    "height": 64,
    "num_steps": 2,
    "device": "cpu",
    "dtype": "float32",
}


def test_a_sweep_on_two_hosts_of_which_one_is_lost(nano, two_hosts):
    """The pictures are those of one process, bit for bit."""
    import numpy as np
    from PIL import Image

    from flux.scan.sweep import LayerSkipper, plan
    from flux.settings.complete import resolve
    from flux.settings.demos import SkipSettings

    settings = resolve(SkipSettings(**SWEEP))
    tasks = plan(settings, nano.spec.num_layers)
    skipper = LayerSkipper(settings, nano)
    wanted = [skipper.make(task) for task in tasks]
    [host] = two_hosts.worker_nodes
    found = {}
    for number, files in run_tasks(LayerSkipper, (settings,), tasks, 2, two_hosts.address):
        if not found:
            two_hosts.remove_node(host, allow_graceful=False)
        found[number] = [Image.open(io.BytesIO(file)) for file in files]
    assert len(tasks) == 4
    assert found.keys() == set(range(4))
    for number, pictures in enumerate(wanted):
        assert len(pictures) == len(found[number])
        assert all(np.array_equal(*pair) for pair in zip(pictures, found[number]))
