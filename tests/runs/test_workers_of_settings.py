"""Where a run's tasks are done, by the workers and the device that its settings name."""

import pytest

import flux.runs.workers
from flux.runs.workers import run_tasks_of
from flux.settings.demos import SkipSettings


@pytest.mark.parametrize(("workers", "address"), [(1, None), (2, None), (1, "auto")])
def test_here_or_by_ray(monkeypatch, workers, address):
    """Here with what is loaded already, or by Ray with the settings alone, whose device is a worker's own."""
    calls = []
    monkeypatch.setattr(flux.runs.workers, "run_tasks", lambda *given: calls.append(given))
    settings = SkipSettings(prompts=["a"], device="cuda:1", workers=workers, ray_address=address)
    run_tasks_of(settings, str, ("loaded",), [3])
    if workers == 1 and address is None:
        assert calls == [(str, (settings, "loaded"), [3])]
    else:
        on_worker = settings.model_copy(update={"device": "cuda"})
        assert calls == [(str, (on_worker,), [3], workers, address, 1.0)]
