"""The studio without its page: limits, uploads, the engine, the filter, what is saved, scans."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.studio import SMALL, make_classifier, make_studio
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image, save_image
from flux.sampling import Step
from flux.settings.demos import EditSettings, ModelSettings, TestSettings
from flux.settings.doses import DOSES, Dose, dose_of
from flux.settings.files import check_settings, read_settings
from flux.specs import configs
from flux.studio.app import check_address, open_studio
from flux.studio.content_filter import ContentFilter
from flux.studio.limits import Limits
from flux.studio.sessions import KEPT, Visits, portable, read_back
from flux.studio.state import Studio
from flux.vocabulary import unknown_words

pytest.importorskip("gradio")

import gradio_client  # noqa: E402

from flux.studio import engine
from flux.studio.forms import edits_of, numbers_of, text_of
from flux.studio.hardening import OwnFilesOnly  # noqa: E402
from flux.studio.tabs import edit, generate, scan
from flux.studio.tabs.common import words_note  # noqa: E402
from flux.studio.widgets import held_picture, layers_on, news, painted, strip_value  # noqa: E402
from flux.studio.work.edit import edit_settings_of, known_layers, run_edit
from flux.studio.work.generate import run_generate, settings_of  # noqa: E402
from flux.studio.work.scan import run_scan, scan_settings_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def studio(nano, tmp_path) -> Studio:
    return make_studio(nano, tmp_path)


@pytest.fixture
def photo() -> Image.Image:
    ramp = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def finish(work):
    """The run at the end of its reports."""
    return [run for _, run in work][-1]


# What may be asked for


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"width": 4096, "height": 4096}, "4096x4096"),
        ({"width": 512, "height": 512}, "area"),
        ({"num_steps": 10**6}, "steps"),
        ({"count": 50}, "count"),
        ({"count": 1e300}, "count"),
        ({"guidance": 1e300}, "guidance"),
        ({"true_cfg": 101.0}, "true_cfg"),
        ({"prompt": "a" * 10**5}, "100000 letters"),
        ({"num_steps": 2.5}, "integer"),
        ({"seed": -1}, "seed"),
        ({"width": float("nan")}, "width"),
    ],
)
def test_too_much_is_refused(studio, form, said):
    with pytest.raises(InputError, match=said):
        settings_of(studio, {"prompt": "a dog", **form})


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"edits": "\n \n"}, "no edit"),
        ({"edits": "a\n" * 7}, "7 edits"),
        ({"layers": {"on": []}}, "no layer"),
        ({"layers": "<script>"}, "layers '<script>'"),
        ({"layers": {"on": [1, 15]}}, "0 to 14"),
        ({"inject_from": 0.8, "inject_until": 0.2}, "inject_from"),
        ({"dose": "huge"}, "dose"),
    ],
)
def test_edits_that_cannot_be(studio, form, said):
    with pytest.raises(InputError, match=said):
        edit_settings_of(studio, {"prompt": "a dog", "edits": "a cat", "layers": {"on": [1]}, **form})


def test_layers_from_a_browser_are_checked():
    assert layers_on({"on": [3, 1, 1]}, 15) == (1, 3)
    for wrong in ([15], [-1], ["2"], [True], [[1]], "1", None):
        with pytest.raises(InputError, match="0 to 14"):
            layers_on({"on": wrong}, 15)
    assert strip_value(15, 5, (2, 1), {1: 0.5})["vitality"] == {"1": 0.5}


def test_edits_as_lines_and_back():
    text = "a cat\n> a white cat\n> a white cat at night\na fox"
    edits = edits_of(text)
    assert edits[1] == "a fox"
    assert edits[0]["then"][1] == "a white cat at night"
    settings = EditSettings(prompt="a dog", edits=edits)
    assert [entry.prompt for entry in settings.entries] == [line.lstrip("> ") for line in text.splitlines()]
    assert text_of(settings.edits) == text


# Uploads


def test_uploads_are_bare_pixels(studio, tmp_path, photo):
    exif = Image.Exif()
    exif[274], exif[270] = 6, "where I live"  # turned by a quarter, and a secret
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    picture = studio.limits.read_upload({"path": tmp_path / "photo.jpg"}, tmp_path)
    assert picture.size == photo.size[::-1]
    assert not picture.info
    kept = studio.visits.of("a").take(picture)
    assert b"where I live" not in kept.read_bytes()
    assert kept.suffix == ".png"


def test_uploads_that_are_refused(studio, tmp_path, photo):
    inside = tmp_path / "uploads"
    inside.mkdir()
    save_image(photo, tmp_path / "secret.png")
    (inside / "no.png").write_text("<svg/>")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    outside = [tmp_path / "secret.png", inside / "../secret.png", inside / "link.png", "/etc/passwd"]
    for path in (*outside, "a\0b", "a" * 5000, None, 7):
        with pytest.raises(InputError, match="not uploaded"):
            studio.limits.read_upload({"path": path}, inside)
    for upload in ("no.png", [], {}):
        with pytest.raises(InputError, match="not uploaded"):
            studio.limits.read_upload(upload, inside)
    with pytest.raises(InputError, match="Got no.png") as caught:
        studio.limits.read_upload({"path": inside / "no.png"}, inside)
    assert str(tmp_path) not in str(caught.value)
    save_image(photo, inside / "big.png")
    for limits, said in (
        (Limits(64, 64, upload_bytes=10), "MB"),
        (Limits(64, 64, upload_pixels=10), "pixels"),
    ):
        with pytest.raises(InputError, match=said):
            limits.read_upload({"path": inside / "big.png"}, inside)


def test_an_upload_that_was_deleted(tmp_path):
    with pytest.raises(InputError, match="upload it again") as caught:
        held_picture(str(tmp_path / "gone.png"))
    assert str(tmp_path) not in str(caught.value)


def test_what_is_painted():
    layer = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert painted(None) is painted({"layers": [layer]}) is None
    layer.putpixel((1, 2), (255, 255, 255, 200))
    mask = painted({"background": None, "layers": [layer]})
    assert mask.getpixel((1, 2)) == 255
    assert mask.getextrema() == (0, 255)


# The engine


def steps_of(count: int, delay: float = 0.0):
    def work(tell):
        tell.begin("counting", count)
        for _ in range(count):
            time.sleep(delay)
            tell.advance()
        return "end"

    return work


def run(engine, work, stop=None):
    """Its reports and its result."""
    reports, generator = [], engine.run(work, stop or threading.Event())
    try:
        while True:
            reports.append(next(generator))
    except StopIteration as end:
        return reports, end.value


def test_reports_and_time_left(studio):
    reports, result = run(studio.engine, steps_of(4, 0.05))
    assert result == "end"
    assert reports[-1].done >= 3
    assert reports[-1].total == 4
    halfway = next(report for report in reports if report.done == 2)
    assert 0.05 < halfway.left < 1
    assert "2 of 4" in news(halfway)
    assert "width:50.0%" in news(halfway)


def test_stop_and_errors(studio):
    stop = threading.Event()
    generator = studio.engine.run(steps_of(1000, 0.02), stop)
    next(generator)
    stop.set()
    assert len(list(generator)) < 5
    with pytest.raises(ZeroDivisionError):
        run(studio.engine, lambda tell: 1 / 0)
    assert run(studio.engine, steps_of(1))[1] == "end"  # and it goes on working


def test_a_visitor_who_leaves_stops_the_work(studio):
    generator = studio.engine.run(steps_of(1000, 0.02), threading.Event())
    next(generator)
    begin = time.perf_counter()
    generator.close()
    assert time.perf_counter() - begin < 5
    assert not studio.engine._lock.locked()


def test_one_at_a_time(studio):
    running, most = 0, 0

    def work(tell):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1

    threads = [threading.Thread(target=lambda: run(studio.engine, work)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 1


def test_previews_take_a_fifth_of_the_time(monkeypatch):
    """The first step has one; where a preview takes twice as long as a step, then one of eight has."""
    now, made, reports = [0.0], [], []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])

    def preview(*given) -> str:
        made.append(now[0])
        now[0] += 2.0
        return "preview"

    teller = engine.Teller(SimpleNamespace(preview=preview), threading.Event(), reports.append)
    teller.begin("steps", 30)
    for _ in range(30):
        now[0] += 1.0
        teller.step(None)
    assert made == [1.0, 11.0, 21.0, 31.0]
    assert sum(report.preview is not None for report in reports) == len(made)


def test_previews_are_small(studio):
    latent = torch.randn(1, (512 // 16) * (256 // 16), 64)
    preview = studio.engine.preview(Step(1.0, 0.9, latent, torch.zeros_like(latent), {}), 512, 256)
    assert preview.size == (256, 128)


# The content filter


@pytest.fixture
def classifier(tmp_path):
    return partial(make_classifier, tmp_path / "classifier")


def test_content_filter(studio, classifier, photo):
    assert not ContentFilter.load(classifier(says=0))(photo)
    studio.engine.unsafe = ContentFilter.load(classifier(says=1))
    visit, settings = studio.visits.of("a"), settings_of(studio, {"prompt": "a dog"})
    previews = []
    with pytest.raises(InputError, match="content filter"):
        for report, _ in run_generate(studio, visit, settings):
            previews.append(report.preview)
    assert not any(previews)
    assert not visit.pictures()


def test_no_scan_shows_what_the_filter_objects_to(studio, classifier):
    studio.engine.unsafe = ContentFilter.load(classifier(says=1))
    settings = scan_settings_of(studio, {"prompts": "a dog", "layers": [0], "num_steps": 1})
    with pytest.raises(InputError, match="content filter"):
        list(run_scan(studio, studio.visits.of("a"), settings))
    assert not list(Path(settings.output_dir).rglob("*.png"))


def test_content_filters_that_are_none(classifier, tmp_path):
    with pytest.raises(InputError, match="nsfw"):
        ContentFilter.load(classifier(labels=("cat", "dog")))
    with pytest.raises(InputError, match="content_filter"):
        ContentFilter.load(str(tmp_path / "nothing"))


def test_the_filter_is_for_flux_1_by_default(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ContentFilter, "load", lambda name, device: asked.append(name))
    monkeypatch.setattr("flux.pipeline.Pipeline.load", lambda settings: None)
    for model, choice in (
        ("flux-nano", "auto"),
        ("flux-schnell", "auto"),
        ("flux-schnell", "off"),
        ("flux-nano", "x"),
    ):
        open_studio(ModelSettings(model=model, device="cpu"), tmp_path, choice)
    assert asked == ["Falconsai/nsfw_image_detection", "x"]


def test_the_model_is_loaded_in_a_thread_that_is_gone(monkeypatch, tmp_path):
    """One that stayed would slow down all that compute after it. What it raises is told as ever."""
    threads = []
    monkeypatch.setattr(
        "flux.pipeline.Pipeline.load", lambda settings: threads.append(threading.current_thread())
    )
    open_studio(ModelSettings(device="cpu"), tmp_path)
    threads[0].join(10)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()

    def refuse(settings):
        raise InputError("no such weights")

    monkeypatch.setattr("flux.pipeline.Pipeline.load", refuse)
    with pytest.raises(InputError, match="no such weights"):
        open_studio(ModelSettings(device="cpu"), tmp_path)


def test_where_it_cannot_be_served():
    """Said before a model is loaded."""
    for auth in ("secret", ":secret", "me:", 7):
        with pytest.raises(InputError, match="user:password"):
            check_address(None, None, auth)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port in ((None, taken.getsockname()[1]), ("192.0.2.1", None), (None, 10**6), (None, "x")):
            with pytest.raises(InputError, match="Cannot serve"):
                check_address(host, port, None)
    check_address("127.0.0.1", None, "me:secret:word")


# What is saved, and that the demos take it


def demo(name: str, record: Path, out: Path, **more) -> Path:
    main = runpy.run_path(str(ROOT / f"{name}.py"))["main"]
    main(str(record), output_dir=str(out), **more)
    return out


def assert_same(a: Path, b: Path) -> None:
    assert np.array_equal(np.asarray(read_image(a)), np.asarray(read_image(b)))


def test_demo_0_repeats_a_run(studio, tmp_path, photo):
    settings = settings_of(
        studio, {"prompt": "a dog", "seed": 3, "count": 2, "image": photo, "strength": 0.5}
    )
    made = finish(run_generate(studio, studio.visits.of("a"), settings, photo))
    out = demo("demo_0_test", made.record, tmp_path / "again")
    for name in ("000", "001"):
        assert_same(made.pictures[name], out / f"{name}.png")
    settings, about = read_back(made.pictures["001"])
    assert (about["prompt"], about["seed"]) == ("a dog", 4)
    assert settings.strength == 0.5


def test_demo_4_repeats_an_edit_of_a_photograph(studio, tmp_path, photo):
    form = {"prompt": "a dog", "edits": "a cat\n> a white cat", "layers": {"on": [0, 3]}, "photo": photo}
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    settings = edit_settings_of(studio, form)
    made = finish(run_edit(studio, studio.visits.of("a"), settings, photo, mask))
    assert list(made.pictures) == ["reference", "edit_0", "edit_1"]
    out = demo("demo_4_edit", made.record, tmp_path / "again")
    for name, path in made.pictures.items():
        assert_same(path, out / f"{name}.png")
    # The ZIP is taken home, and runs there.
    with zipfile.ZipFile(studio.visits.of("a").zip()) as archive:
        archive.extractall(tmp_path / "home")
    settings = read_settings(EditSettings, tmp_path / "home" / "000_edit" / "run.json")
    assert Path(settings.photo).parent == tmp_path / "home" / "000_edit" == Path(settings.mask).parent


def test_a_dose_of_the_page_is_the_named_one_but_for_what_is_changed(studio):
    """The page shows its numbers; sent along untouched, they must not stand for a user's own."""
    form = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0, 3]}}

    def asked(dose: str, **own) -> Dose:
        [entry] = edit_settings_of(studio, {**form, "dose": dose, **numbers_of(dose), **own}).entries
        return dose_of(entry)

    for name, dose in DOSES.items():
        assert asked(name) == dose
    assert asked("auto", weight=0.7) == replace(DOSES["auto"], weight=0.7)
    assert asked("auto", inject_until=0.5) == replace(DOSES["auto"], inject_until=0.5, all_over_until=None)


def test_a_kept_reference_is_used_again(studio):
    form = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0, 1, 3]}}
    visit = studio.visits.of("a")
    first = finish(run_edit(studio, visit, edit_settings_of(studio, form)))
    kept = studio.engine.kept[1]
    fewer = finish(run_edit(studio, visit, edit_settings_of(studio, {**form, "layers": {"on": [1]}})))
    assert studio.engine.kept[1] is kept
    assert_same(first.pictures["reference"], fewer.pictures["reference"])
    assert first.pictures["edit_0"].read_bytes() != fewer.pictures["edit_0"].read_bytes()
    finish(run_edit(studio, visit, edit_settings_of(studio, {**form, "seed": 9})))
    assert studio.engine.kept[1] is not kept


def test_pictures_of_others_are_refused(tmp_path, photo):
    photo.save(tmp_path / "other.png")
    (tmp_path / "other.json").write_text('{"demo": "scan", "settings": {}}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("other.png", "other.json", "broken.json"):
        with pytest.raises(InputError, match=name):
            read_back(tmp_path / name)


def test_visits_are_apart_and_bounded(tmp_path):
    visits = Visits(tmp_path)
    first = visits.of("first")
    assert visits.of("first") is first
    assert visits.of("second").folder != first.folder
    for number in range(300):
        visits.of(str(number))
    assert visits.of("first") is not first
    with pytest.raises(InputError, match="nothing to save"):
        first.zip()


def test_visits_are_deleted_a_day_after_their_last_use(tmp_path, photo):
    visits = Visits(tmp_path)
    old, used = visits.of("old"), visits.of("used")
    for visit in (old, used):
        visit.take(photo)
        os.utime(visit.folder, times=(time.time() - KEPT - 1,) * 2)
    assert visits.of("used") is used
    assert old.folder.is_dir()
    visits.of("new")
    assert used.folder.is_dir()
    assert not old.folder.exists()
    assert visits.of("old") is not old
    assert visits.of("used") is used
    os.utime(used.folder, times=(time.time() - KEPT - 1,) * 2)
    Visits(tmp_path)  # a start tidies up too
    assert not used.folder.exists()


def test_files_of_the_server_are_not_named(studio, tmp_path, monkeypatch):
    """Neither by run.json nor by pictures nor by what a scan gives; the page takes these."""
    own = {"weights": str(tmp_path / "private" / "mine.safetensors")}
    Path(own["weights"]).parent.mkdir()
    Path(own["weights"]).symlink_to(configs["flux-nano"].folder / "transformer.safetensors")
    monkeypatch.setattr(studio.engine, "settings", studio.engine.settings.model_copy(update=own))
    visit = studio.visits.of("a")
    made = finish(run_generate(studio, visit, settings_of(studio, {"prompt": "a dog", "num_steps": 1})))
    settings = scan_settings_of(studio, {"prompts": "a dog", "layers": {"on": [0]}, "num_steps": 1, "top": 1})
    list(run_scan(studio, visit, settings))
    folder = Path(settings.output_dir)
    given = [made.record, *made.pictures.values(), folder / "vital_layers.json", folder / "report.html"]
    for path in (*given, *folder.rglob("*.png")):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert read_back(made.pictures["000"])[0].weights == "mine.safetensors"
    list(run_scan(studio, visit, settings))  # and the scan is still known as the same


def test_demos_load_the_weights_that_a_studio_was_started_with(tmp_path, monkeypatch):
    """By their bare names in run.json: where the demo runs, beside run.json, or where it is told."""
    nano, private = configs["flux-nano"].folder, tmp_path / "private"
    private.mkdir()
    for name in ("transformer", "ae", "schnell_lora"):
        (private / f"my_{name}.safetensors").symlink_to(nano / f"{name}.safetensors")
    own = {"weights": str(private / "my_transformer.safetensors")}
    own |= {"ae_weights": str(private / "my_ae.safetensors"), "text_encoders": str(nano)}
    lora = str(private / "my_schnell_lora.safetensors")
    fields = {**own, "lora": [{"file": lora, "weight": 0.7}], "device": "cpu", **SMALL}
    studio = open_studio(check_settings(ModelSettings, fields), tmp_path / "studio")
    made = finish(run_generate(studio, studio.visits.of("a"), settings_of(studio, {"prompt": "a dog"})))
    assert str(private) not in made.record.read_text()

    with pytest.raises(SystemExit):
        demo("demo_0_test", made.record, tmp_path / "lost")
    told = {**own, "lora": [{"file": lora, "weight": 0.7}]}
    assert_same(made.pictures["000"], demo("demo_0_test", made.record, tmp_path / "told", **told) / "000.png")
    taken = tmp_path / "taken"
    taken.mkdir()
    for path in (*private.iterdir(), made.record):
        (taken / path.name).symlink_to(path.resolve())
    (taken / nano.name).symlink_to(nano)
    assert_same(made.pictures["000"], demo("demo_0_test", taken / "run.json", tmp_path / "a") / "000.png")
    monkeypatch.chdir(taken)
    assert_same(made.pictures["000"], demo("demo_0_test", made.record, tmp_path / "b") / "000.png")


def test_files_are_named_without_their_folders(tmp_path):
    (tmp_path / "a.safetensors").touch()
    loras = [{"file": str(tmp_path / "a.safetensors"), "weight": 1.0}, {"file": "owner/name", "weight": 1.0}]
    fields = portable({"weights": None, "t5_weights": f"{tmp_path}/", "lora": loras, "output_dir": "x"})
    named = [{**loras[0], "file": "a.safetensors"}, loras[1]]
    assert fields == {"weights": None, "t5_weights": tmp_path.name, "lora": named}


def test_paths_that_are_served(tmp_path):
    allowed = OwnFilesOnly(None, tmp_path).allowed
    assert allowed(f"/gradio_api/file={tmp_path}/stream/a.png")
    assert allowed("/gradio_api/queue/join")
    for path in (f"{tmp_path}/../b.png", "http://a.b/c.png", "a.png", "/etc/passwd", "a" * 5000, "/a\0b"):
        assert not allowed(f"/gradio_api/file={path}") and not allowed(f"/under/gradio_api/file/{path}"), path


# Words


def test_words_that_a_model_does_not_know(studio):
    form = {"prompt": "a dog", "edits": "a <b>zebrra</b>", "layers": {"on": [1]}}
    note = words_note(studio, edit_settings_of(studio, form))
    assert "zebrra" in note
    assert "near: zebra" in note
    assert "<b>zebrra</b>" in note
    form = {"prompts": "a dog on a skyscraper", "layers": {"on": [1]}}
    assert "skyscraper" in words_note(studio, scan_settings_of(studio, form))
    assert words_note(studio, settings_of(studio, {"prompt": "a dog"})) == ""


def test_examples_use_known_words():
    texts = [prompt for prompt, _ in generate.EXAMPLES["flux-nano"]] + [scan.PROMPTS, scan.PROMPT]
    texts += [f"{prompt} {edits}" for prompt, _, edits in edit.EXAMPLES["flux-nano"]]
    assert not unknown_words(" ".join(texts), configs["flux-nano"].vocabulary)


# Scans


def test_a_scan_stops_within_a_step(studio):
    settings = scan_settings_of(studio, {"prompts": "a dog", "layers": {"on": [0]}, "num_steps": 20})
    visit, steps = studio.visits.of("a"), 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == 3:
            visit.stop.set()

    hook = studio.engine.pipe.model.final_layer.register_forward_hook(count)
    try:
        assert not [report for report in run_scan(studio, visit, settings) if report.made]
    finally:
        hook.remove()
    assert steps == 3
    assert not list(Path(settings.output_dir).rglob("reference.png"))


def test_a_scan_goes_on_where_it_was_stopped(studio):
    form = {"prompts": "a dog\nan owl", "layers": {"on": [0, 4, 9]}, "top": 1}
    settings, visit = scan_settings_of(studio, form), studio.visits.of("a")
    for report in run_scan(studio, visit, settings):
        if report.done == 2:
            visit.stop.set()
    folder = Path(settings.output_dir)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("skip_*.png")}
    assert 1 <= len(made) < 6
    assert not (folder / "vital_layers.json").exists()
    visit.stop.clear()
    named = [report.made[0] for report in run_scan(studio, visit, settings) if report.made]
    assert named[-1] == "found"
    assert "vitality" in named
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert len(json.loads((folder / "vital_layers.json").read_text())["vital_layers"]) == 1
    assert (folder / "report.html").is_file()


def test_layers_that_are_on_at_first(studio):
    assert known_layers(studio)[0] == configs["flux-nano"].vital_layers


def test_the_space_installs_what_the_package_needs():
    needed = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.S)[1]
    listed = (ROOT / "docs" / "space" / "requirements.txt").read_text().split()
    assert set(re.findall(r'"(.*?)"', needed)) <= set(listed)
    assert any(line.startswith("gradio") for line in listed)


@pytest.mark.slow
def test_the_space_starts_and_answers(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copytree(ROOT / "docs" / "space", tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "flux", tmp_path / "flux")  # and nothing else, as its README says
    more = {"STUDIO_MODEL": "flux-nano", "GRADIO_SERVER_PORT": str(port)}
    more |= {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    app = [sys.executable, "-u", "app.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(app, cwd=tmp_path, env={**os.environ, **more}, **pipes) as space:
        try:
            said = []
            while not said or "Running on" not in said[-1]:
                said.append(space.stdout.readline())
                assert said[-1], "".join(said)
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            how = {"width": 64, "height": 64, "num_steps": 1}
            pictures, *_ = client.predict("a dog", **how, api_name="/generate")
            assert read_image(pictures[0]).size == (64, 64)
        finally:
            space.terminate()


def test_settings_of_a_picture_beside_the_file(tmp_path, photo):
    save_image(photo, tmp_path / "start.png")
    data = {"demo": "test", "settings": {"prompts": ["a dog"], "image": "start.png"}}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert read_settings(TestSettings, tmp_path / "run.json").image == str(tmp_path / "start.png")
    assert check_settings(TestSettings, data["settings"]).image == "start.png"
