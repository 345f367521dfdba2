"""Tasks done here, or shared by Ray among the two hosts of a cluster on this machine, which die at times."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import pytest
from helpers.ray_work import HOST, Packing, Picky, Stillborn, Surroundings, Toy
from helpers.waiting import WAIT, until

from flux.errors import InputError
from flux.runs import ray_pool
from flux.runs.workers import device_on_worker, finish_beside, run_tasks

# One test of the whole runs by default; the others together take a minute, and more on a busy machine.
slow = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("environment")


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


# ---- in this process


class Here:
    """Notes its tasks, and packs nothing."""

    made = 0

    def __init__(self, log: list[str]):
        self.log = log
        Here.made += 1

    def run(self, task: int) -> int:
        self.log.append(f"run {task}")
        return task * 10

    def pack(self, result: int) -> int:
        pytest.fail("packed")


def test_one_worker_without_an_address_works_here(monkeypatch):
    """The work is made once there is a task to do, and each task runs when its result is asked for."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(Here, "made", 0)
    log = []
    assert list(run_tasks(Here, (log,), [])) == []
    assert Here.made == 0
    results = run_tasks(Here, (log,), [3, 1, 2])
    assert next(results) == (0, 30)
    assert log == ["run 3"]
    assert list(results) == [(1, 10), (2, 20)]
    assert Here.made == 1


def test_results_are_finished_beside_the_next_task():
    """Each in another thread, one at a time and in order, while the next result is made."""
    made, finishing, threads = [], [], set()

    def results():
        for number in range(4):
            if number:
                until(lambda number=number: len(finishing) == number)
            made.append(number)
            yield number, f"result {number}"

    def finish(number: int, result: str) -> str:
        finishing.append(number)
        threads.add(threading.get_ident())
        if number < 3:
            until(lambda: len(made) > number + 1)
        return f"{number}: {result}"

    assert list(finish_beside(results(), finish)) == [f"{number}: result {number}" for number in range(4)]
    assert finishing == [0, 1, 2, 3]
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


@pytest.mark.parametrize("error", [InputError("a full disk"), KeyboardInterrupt()], ids=repr)
def test_an_error_while_finishing_ends_the_run(error):
    """When the next result is there; no more are made."""
    log = []

    def finish(number: int, result: int) -> None:
        if number == 1:
            raise error

    with pytest.raises(type(error)):
        list(finish_beside(run_tasks(Here, (log,), range(9)), finish))
    assert log == ["run 0", "run 1", "run 2"]


def test_stopping_early_stops_the_tasks():
    closed = []

    def results():
        try:
            yield from enumerate(range(9))
        finally:
            closed.append(True)

    with closing(finish_beside(results(), lambda number, result: number)) as finished:
        assert next(finished) == 0
    assert closed == [True]


def test_a_ray_worker_sees_its_gpu_as_the_first():
    devices = ("cuda:1", "cuda", "cpu", "auto")
    assert [device_on_worker(device) for device in devices] == ["cuda", "cuda", "cpu", "auto"]


# ---- shared by Ray


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


@slow
def test_packing_does_not_hold_up_the_next_task(two_hosts):
    """All work is in the thread that made it, and packing in another."""
    results = dict(run_tasks(Packing, (), range(4), 1, two_hosts.address))
    assert results == dict.fromkeys(range(4), (True, "packed"))


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


@slow
def test_workers_that_all_die_at_the_start(two_hosts):
    """They are not replaced for ever."""
    with pytest.raises(InputError, match=r"No worker could start .the last one was lost"):
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


@slow
def test_an_error_of_the_work_at_the_start(two_hosts):
    with pytest.raises(InputError, match=r"^no file x.safetensors$"):
        list(run_tasks(Picky, ("x.safetensors",), [1], 1, two_hosts.address))


@slow
def test_more_workers_than_there_is_room_for(two_hosts, capfd):
    """Those for which there is room do it; where there is none for a single one it is said at once."""
    assert squares(run_tasks(Toy, (), numbers(8), 5, two_hosts.address)) == expected(8)
    assert "5 workers want 1 CPU each, the cluster has room for " in capfd.readouterr().err
    with pytest.raises(InputError, match=r"No host of the cluster has 2 GPU for a worker"):
        list(run_tasks(Toy, (), numbers(2), 2, two_hosts.address, num_gpus_per_worker=2))


@slow
def test_a_cluster_that_others_use(two_hosts, monkeypatch):
    """A run that finds no room for a single worker gives up."""
    import ray

    monkeypatch.setattr(ray_pool, "NO_WORKER_SECONDS", 1.0)
    ray.init(address=two_hosts.address, log_to_driver=False, logging_level="ERROR")
    try:
        others = [ray.remote(num_cpus=1)(Toy).remote() for _ in range(2)]
        ray.get([other.run.remote({"number": 1}) for other in others])
        with pytest.raises(InputError, match=r"No worker is left.*no room for one .all are in use"):
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

    monkeypatch.setattr(ray_pool, "CONNECT_SECONDS", 1.0)
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
    monkeypatch.setattr(ray_pool, "__version__", "0.0.0")
    with pytest.raises(InputError, match=r"Got a worker on .* here it is 0.0.0: install the same"):
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
    """The images are those of one process, bit for bit."""
    import numpy as np

    from flux.scan.skipper import LayerSkipper
    from flux.scan.sweep import plan
    from flux.settings.complete import resolve
    from flux.settings.demos import SkipSettings

    settings = resolve(SkipSettings(**SWEEP))
    tasks = plan(settings, nano.spec.num_layers)
    skipper = LayerSkipper(settings, nano)
    wanted = [skipper.make(task) for task in tasks]
    [host] = two_hosts.worker_nodes
    found = {}
    for number, decode in run_tasks(LayerSkipper, (settings,), tasks, 2, two_hosts.address):
        if not found:
            two_hosts.remove_node(host, allow_graceful=False)
        found[number] = decode()
    assert len(tasks) == 4
    assert found.keys() == set(range(4))
    for number, images in enumerate(wanted):
        assert len(images) == len(found[number])
        assert all(np.array_equal(*pair) for pair in zip(images, found[number]))
