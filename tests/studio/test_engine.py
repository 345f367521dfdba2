import threading
import time

import pytest
import torch
from helpers.studio import finish

from flux.errors import InputWarning
from flux.sampling import Step
from flux.studio.forms import generate_settings
from flux.studio.tabs.runs import words_note
from flux.studio.widgets import status_html
from flux.studio.work.generate import run_generate


def count(steps: int, delay: float = 0.0):
    """Work that takes a number of steps."""

    def work(progress):
        progress.begin("counting", steps)
        for _ in range(steps):
            time.sleep(delay)
            progress.advance()
        return "end"

    return work


def run(engine, work):
    """Its updates and its result."""
    updates, generator = [], engine.run(work, threading.Event())
    try:
        while True:
            updates.append(next(generator))
    except StopIteration as end:
        return updates, end.value


def test_updates_and_time_left(studio):
    updates, result = run(studio.engine, count(4, 0.05))
    assert result == "end"
    assert updates[-1].done >= 3
    assert updates[-1].total == 4
    halfway = next(update for update in updates if update.done == 2)
    assert 0.05 < halfway.seconds_left < 1
    assert "2 of 4" in status_html(halfway)
    assert "width:50.0%" in status_html(halfway)


def test_stop_and_errors(studio):
    stop = threading.Event()
    generator = studio.engine.run(count(1000, 0.02), stop)
    next(generator)
    stop.set()
    assert len(list(generator)) < 5
    with pytest.raises(ZeroDivisionError):
        run(studio.engine, lambda progress: 1 / 0)
    assert run(studio.engine, count(1))[1] == "end"  # and it goes on working


def test_results_are_never_dropped(studio):
    """Not even those of a run that is cancelled meanwhile."""
    stop = threading.Event()

    def work(progress):
        progress.emit(1)
        stop.set()
        progress.emit(2)
        progress.advance()
        progress.emit(3)

    assert [update.result for update in studio.engine.run(work, stop)] == [1, 2]


def test_a_visitor_who_leaves_stops_the_work(studio):
    generator = studio.engine.run(count(1000, 0.02), threading.Event())
    next(generator)
    begin = time.perf_counter()
    generator.close()
    assert time.perf_counter() - begin < 5
    assert not studio.engine.running


def test_one_at_a_time(studio):
    running, most = 0, 0

    def work(progress):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1

    threads = [threading.Thread(target=lambda: run(studio.engine, work)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_previews_are_small(studio):
    latent = torch.randn(1, (512 // 16) * (256 // 16), 64)
    preview = studio.engine.preview(Step(1.0, 0.9, latent, torch.zeros_like(latent), {}), 512, 256)
    assert preview.size == (256, 128)


def test_what_a_visitor_typed_stays_off_the_console(studio, recwarn):
    """The page says it beside the prompt."""
    settings = generate_settings(studio, {"prompt": "an elefant " + "on the grass " * 60})
    made = finish(run_generate(studio, studio.sessions.of("a"), settings))
    assert made.images
    assert not [warning for warning in recwarn if issubclass(warning.category, InputWarning)]
    note = words_note(studio, settings)
    assert "elefant" in note
    assert "overlooks its last words" in note
