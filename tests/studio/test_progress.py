import threading

from flux.studio import progress


def test_previews_take_a_fifth_of_the_time(monkeypatch):
    """The first step has one; where a preview takes twice as long as a step, then one of eight has."""
    now, made, updates = [0.0], [], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def preview(*given) -> str:
        made.append(now[0])
        now[0] += 2.0
        return "preview"

    told = progress.Progress(preview, threading.Event(), updates.append)
    told.begin("steps", 30)
    for _ in range(30):
        now[0] += 1.0
        told.step(None)
    assert made == [1.0, 11.0, 21.0, 31.0]
    assert sum(update.preview is not None for update in updates) == len(made)
