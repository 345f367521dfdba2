import threading
import time
from contextlib import ExitStack

import pytest

from flux.errors import InputError
from flux.studio import line as line_room
from flux.studio.callers import Callers
from flux.studio.line import Line


def place(line, job) -> str:
    return next(line.wait(job)).text


def test_callers_take_turns():
    line = Line()
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(line.join(caller, tab))
            for caller, tab in (("a", "edit"), ("a", "film"), ("a", "scan"), ("b", "edit"), ("c", "edit"))
        ]
        first, second, third, other, last = jobs
        assert list(line.wait(first)) == []  # its turn, at once
        assert place(line, other) == "waiting, next in line"
        assert place(line, last) == "waiting, 2 runs before yours"
        assert place(line, second) == "waiting, 3 runs before yours"
        assert place(line, third) == "waiting, 4 runs before yours"


def test_ones_own_run_is_named():
    line = Line()
    with line.join("a", "edit") as first, line.join("a", "film") as second:
        list(line.wait(first))
        assert place(line, second) == "waiting for your other run"


def test_the_next_begins_when_one_leaves(monkeypatch):
    monkeypatch.setattr(line_room, "LOOK_SECONDS", 30.0)
    line, begun = Line(), threading.Event()

    def follow():
        with line.join("b", "edit") as job:
            list(line.wait(job))
            begun.set()

    with line.join("a", "edit") as first:
        list(line.wait(first))
        thread = threading.Thread(target=follow)
        thread.start()
        assert not begun.wait(0.2)
    assert begun.wait(5)
    thread.join(5)
    assert not line.has("b", "edit")


def test_a_waiting_run_is_stopped_without_the_one_that_runs():
    line = Line()
    with line.join("a", "edit") as first, line.join("a", "film") as second:
        list(line.wait(first))
        line.stop("a", "film")
        assert list(line.wait(second)) == []
        assert second.stop.is_set()
        assert second.begun is None
        assert not first.stop.is_set()


def test_time_left_is_estimated_from_earlier_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(line_room.time, "monotonic", lambda: now[0])
    line = Line()
    for _ in range(3):
        with line.join("a", "edit") as job:
            list(line.wait(job))
            now[0] += 10
    with line.join("a", "edit") as first, line.join("b", "edit") as second, line.join("c", "edit") as third:
        list(line.wait(first))
        now[0] += 4
        assert next(line.wait(second)).seconds_left == 6
        assert next(line.wait(third)).seconds_left == 16
        now[0] += 20  # longer than usual: nobody knows
        assert next(line.wait(second)).seconds_left is None


def test_nobody_fills_the_line():
    line = Line(most=8, most_each=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(line.join("a", "endpoint", "1.1.1.1"))
        with pytest.raises(InputError, match="more than 2 runs"):
            stack.enter_context(line.join("a", "endpoint", "1.1.1.1"))
        for number in range(2):
            stack.enter_context(line.join(f"made-up-{number}", "endpoint", "1.1.1.1"))
        with pytest.raises(InputError, match="busy"):
            stack.enter_context(line.join("another", "endpoint", "1.1.1.1"))
        stack.enter_context(line.join("b", "endpoint", "2.2.2.2"))
    with line.join("a", "endpoint", "1.1.1.1"):
        pass


def test_a_closed_line_ends_all():
    line = Line()
    with line.join("a", "edit") as job:
        list(line.wait(job))
        assert not line.close(0.1)
        assert job.stop.is_set()
    assert line.close(0.1)
    with pytest.raises(InputError, match="closing"), line.join("a", "edit"):
        pass


def test_callers_are_known_as_long_as_they_are_connected(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    callers = Callers(most=2)
    assert callers.admit("a", "1.1.1.1")
    assert callers.admit("b", "1.1.1.1")
    assert not callers.admit("c", "1.1.1.1")
    assert callers.admit("a", "1.1.1.1")
    assert callers.admit("c", "2.2.2.2")
    assert callers.address("c") == "2.2.2.2"
    with callers.listening("a"):
        now[0] += 10_000
        assert not callers.is_gone("a")
        assert set(callers.forget_idle()) == {"b", "c"}
    assert not callers.is_gone("a")
    now[0] += 60
    assert callers.is_gone("a")
    assert not callers.is_gone("unknown")
    assert callers.admit("event", "1.1.1.1", is_event=True)
    assert callers.admit("page", "1.1.1.1")
    now[0] += 59
    assert not callers.is_gone("event")
    now[0] += 2
    assert callers.is_gone("event")
    assert not callers.is_gone("page")
