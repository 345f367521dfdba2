"""Images computed by several processes are those of one process; wrong settings are refused in one line."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.parallel_work import CASES, FEW
from PIL import Image

import demo_4_edit
from flux import errors
from flux.errors import InputError, exit_on_input_error, only_rank_zero_prints
from flux.runtime import parallel
from flux.runtime.parallel import ALONE, ProcessGroup, join

ROOT = Path(__file__).parents[2]


def program(*arguments) -> subprocess.CompletedProcess:
    """A program of Python's, in a process of its own."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def torchrun(count: int, *arguments) -> subprocess.CompletedProcess:
    """The program run by so many processes, on a port that is free."""
    return program("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *arguments)


@pytest.fixture(scope="module")
def largest_errors(tmp_path_factory) -> dict[int, dict[str, float]]:
    """The error of each case, in two processes and in four."""
    folder = tmp_path_factory.mktemp("errors")
    done = program(ROOT / "tests" / "helpers" / "parallel_work.py", folder)
    assert done.returncode == 0, done.stderr[:5000]
    return {count: json.loads((folder / f"{count}.json").read_text()) for count in (2, 4)}


@pytest.mark.parametrize(("count", "name"), [*((2, name) for name in CASES), *((4, name) for name in FEW)])
def test_some_processes_equal_one(largest_errors, count, name):
    """Relative to the largest value, in float32; measured 4.4e-7 at most."""
    assert largest_errors[count][name] < 1e-6


def test_demo_4_in_two_processes(tmp_path):
    """Two processes write what one does, and the first alone is heard."""
    fields = {"num_steps": 2, "width": 64, "height": 80, "edits": ["a cat on the grass"]}
    given = [text for name, value in fields.items() for text in (f"--{name}", json.dumps(value))]
    out = ("--output_dir", tmp_path / "two")
    done = torchrun(2, ROOT / "demo_4_edit.py", "edit.json", *given, *out, "--parallel", 2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.splitlines() == [str(tmp_path / "two" / "comparison.png")]
    assert done.stderr.count("edits:   0%") == 1

    demo_4_edit.main("edit.json", **fields, output_dir=str(tmp_path / "one"))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert "edit_0.png" in names
    for name in ("reference.png", "edit_0.png"):
        one, two = (np.asarray(Image.open(tmp_path / way / name)).astype(int) for way in ("one", "two"))
        assert one.std() > 10
        assert abs(one - two).max() <= 1


def test_one_line_of_all_processes():
    done = torchrun(2, ROOT / "demo_0_test.py", "test.json", "--parallel", 3)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: Got parallel 3, but torchrun started 2 processes: make them equal"]
    assert done.returncode != 0


# ---- one process


@pytest.fixture
def launched(monkeypatch):
    """The environment that torchrun makes for one of some processes."""

    def as_process(rank: int, count: int) -> None:
        given = {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank}
        given |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return as_process


def test_one_process_is_alone(launched):
    assert join(1, "auto") is ALONE
    launched(0, 1)
    assert join(1, "auto") is ALONE
    x = torch.arange(6).reshape(1, 6)
    assert ALONE.shard(x).equal(x)
    assert ALONE.gather(x, 1, 2, 4).equal(x)
    assert ALONE.total(x) is x


def test_without_torchrun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo_0_test.py", "my file.json", "--parallel", "2"])
    with pytest.raises(InputError) as error:
        join(2, "auto")
    command = "torchrun --nproc_per_node 2 demo_0_test.py 'my file.json' --parallel 2"
    assert str(error.value) == f"Got parallel 2, but this is a single process: start it with {command}"


@pytest.mark.parametrize(
    ("parallel_setting", "device", "message"),
    [
        (1, "auto", "Got parallel 1, but torchrun started 2 processes"),
        (2, "cuda:1", "Got device 'cuda:1' with parallel 2"),
        (2, "cuda", "Got 2 processes, but this machine has 1 CUDA GPUs"),
    ],
)
def test_processes_that_do_not_fit_the_settings(launched, monkeypatch, parallel_setting, device, message):
    launched(0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda **_: pytest.fail("too late"))
    with pytest.raises(InputError, match=message):
        join(parallel_setting, device)


@pytest.fixture
def gpus(launched, monkeypatch):
    """Two processes of one machine with two GPUs, as far as torch is asked about them."""
    launched(1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    known = parallel.gpus_are_peers, parallel.shared_memory
    yield
    for one in known:
        one.cache_clear()


@pytest.mark.parametrize("set_before", [None, "0"])
def test_copies_are_left_to_copy_engines(gpus, monkeypatch, set_before):
    """Unless whoever started the processes wants something else."""
    monkeypatch.setenv("NCCL_CTA_POLICY", set_before or "")  # undone afterwards, whatever becomes of it
    if not set_before:
        monkeypatch.delenv("NCCL_CTA_POLICY")
    seen = []
    begin = lambda **_: seen.append(os.environ["NCCL_CTA_POLICY"])  # noqa: E731
    monkeypatch.setattr(parallel.dist, "init_process_group", begin)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    ranks = join(2, "cuda")
    assert ranks == ProcessGroup(1, 2, torch.device("cuda", 1))
    assert seen == [set_before or "2"]


def test_peer_memory_is_allocated_once(gpus, monkeypatch):
    """For all shapes that a power of two of bytes holds; it is no tensor of inference alone."""
    made = []
    memory = types.SimpleNamespace(
        set_backend=lambda name: None,
        empty=lambda size, dtype, device: torch.empty(size, dtype=dtype),
        rendezvous=lambda room, group: made.append(room),
    )
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", memory)
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", memory, raising=False)
    monkeypatch.setattr(parallel.dist, "group", types.SimpleNamespace(WORLD=None))
    like = torch.empty(1, dtype=torch.bfloat16)
    with torch.inference_mode():
        first, second, third = (parallel.peer_memory(like, (n, 5)) for n in (100, 90, 110))
    assert (first.shape, first.dtype) == ((100, 5), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr() != third.data_ptr()
    assert [room.nbytes for room in made] == [1024, 2048]
    assert not made[0].is_inference()


@pytest.mark.parametrize("what", ["another machine", "no way from one to the other"])
def test_gpus_that_are_no_peers(gpus, monkeypatch, what):
    if what == "another machine":
        monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    else:
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
    monkeypatch.setattr(parallel, "shared_memory", lambda *_: pytest.fail("nobody would write there"))
    assert parallel.peer_memory(torch.empty(1), (3, 4)).shape == (3, 4)


def test_shards_hold_every_token_once():
    x = torch.randn(2, 7, 3)
    shards = [ProcessGroup(rank, 3).shard(x) for rank in range(3)]
    assert torch.cat(shards, dim=1).equal(x)
    assert tuple(shard.shape[1] for shard in shards) == ProcessGroup(0, 3).sizes(7) == (3, 2, 2)
    assert ProcessGroup(0, 3).sizes(7, 4) == (5, 3, 3)


@pytest.mark.parametrize(
    ("rank", "error", "waits"),
    [
        (0, InputError("wrong"), False),
        (1, InputError("wrong"), True),
        (1, KeyboardInterrupt(), True),
        (0, RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), True),
        (0, RuntimeError("wrong"), False),
    ],
)
def test_whose_error_is_said(launched, monkeypatch, capsys, rank, error, waits):
    """At once by the first process; by another one, or of another one's end, if torchrun lets it live."""
    launched(rank, 2)
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)

    @only_rank_zero_prints()
    def work():
        print("working")
        print("bar", file=sys.stderr)
        raise error

    with pytest.raises(type(error)):
        work()
    assert waited == [errors.TORCHRUN_GRACE_S] * waits
    heard = capsys.readouterr()
    assert (heard.out, heard.err) == (("working\n", "bar\n") if rank == 0 else ("", ""))


def test_another_process_says_its_own_error(launched, monkeypatch, capsys):
    launched(1, 2)
    monkeypatch.setattr(errors.time, "sleep", lambda _: None)
    with pytest.raises(SystemExit) as end, exit_on_input_error(), only_rank_zero_prints():
        raise InputError("only mine")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: only mine\n"
