"""How programs end: on wrong input, on Ctrl-C, on SIGTERM, and when nobody reads what they print."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux.errors import exit_on_input_error, reason_of

ROOT = Path(__file__).parents[1]
WORK = """
import sys, time
from flux.errors import InputError
from flux.settings.command_line import run

def main(error: bool = False, seconds: float = 0, lines: int = 1) -> None:
    for number in range(lines):
        print("line", number, flush=True)
    print("writing", file=sys.stderr, flush=True)
    time.sleep(seconds)
    open("result", "w").close()
    if error:
        raise InputError("one\\ntwo")

run(main, "Work.")
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program that prints, works and leaves the file "result" in the current folder."""

    def begin(*arguments, **more):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", WORK, *map(str, arguments)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **options)

    return begin


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_program_says_so_in_one_line(start, tmp_path, number, status):
    with start("--seconds", 60) as process:
        assert process.stderr.readline() == "writing\n"
        process.send_signal(number)
        *_, last = process.stderr.read().splitlines()
        assert last == "stopped; what was already written stays"
    assert process.returncode == status
    assert not (tmp_path / "result").exists()


def test_under_torchrun_sigterm_ends_at_once(start, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    with start("--seconds", 60) as process:
        process.stderr.readline()
        process.terminate()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGTERM


def test_wrong_input_is_a_line_for_each_problem(start):
    with start("--error") as process:
        assert process.stderr.read() == "writing\nerror: one\nerror: two\n"
    assert process.returncode == 2


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's own."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."), "CUDA .* 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), ".*: 9 bytes"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_memory_that_runs_out_is_one_line(capsys, error, reason):
    with pytest.raises(SystemExit) as end, exit_on_input_error():
        raise error
    assert end.value.code == 2
    said = rf"error: Memory ran out \({reason}\): give offload auto, or make the image or the batch smaller\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), exit_on_input_error():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_does_not_end_the_work(start, tmp_path, monkeypatch, unbuffered):
    """As with `| head -1`: what is printed is dropped, on stdout and stderr."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with start("--lines", 20_000, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
    assert process.returncode == 0
    assert (tmp_path / "result").exists()


@pytest.mark.parametrize("program", ["demo_0_test.py", "demo_gr.py", "-m flux", "-m flux.scan"])
def test_help_into_a_closed_pipe(program):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *program.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_into_a_full_disk_does_not_end_the_work(start, tmp_path):
    with Path("/dev/full").open("w") as full, start(stdout=full) as process:
        assert process.stderr.read() == "writing\n"
    assert process.returncode == 0
    assert (tmp_path / "result").exists()


@pytest.mark.parametrize(("message", "expected"), [("", "OSError"), ("\n  one \ntwo", "one")])
def test_the_reason_is_one_line(message, expected):
    assert reason_of(OSError(message)) == expected
