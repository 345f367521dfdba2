import json
from pathlib import Path

from flux.studio.forms import scan_settings
from flux.studio.work.scan import Vital, run_scan


def test_a_scan_stops_within_a_step(studio):
    settings = scan_settings(studio, {"prompts": "a dog", "layers": {"on": [0]}, "num_steps": 20})
    session, steps = studio.sessions.of("a"), 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == 3:
            session.stop.set()

    hook = studio.engine.pipe.model.final_layer.register_forward_hook(count)
    try:
        assert not [update for update in run_scan(studio, session, settings) if update.result]
    finally:
        hook.remove()
    assert steps == 3
    assert not list(Path(settings.output_dir).rglob("reference.png"))


def test_a_stopped_scan_resumes(studio):
    form = {"prompts": "a dog\nan owl", "layers": {"on": [0, 4, 9]}, "top": 1}
    settings, session = scan_settings(studio, form), studio.sessions.of("a")
    for update in run_scan(studio, session, settings):
        if update.done == 2:
            session.stop.set()
    folder = Path(settings.output_dir)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("skip_*.png")}
    assert 1 <= len(made) < 6
    assert not (folder / "vital_layers.json").exists()
    session.stop.clear()
    *plots, vital = [update.result for update in run_scan(studio, session, settings) if update.result]
    assert set(plots) == {folder / "vitality.png"}
    assert isinstance(vital, Vital)
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert json.loads((folder / "vital_layers.json").read_text())["vital_layers"] == vital.layers
    assert len(vital.layers) == 1
    assert (folder / "report.html").is_file()
