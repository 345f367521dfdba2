import json
import os
import time
import zipfile
from pathlib import Path

import pytest
from helpers.studio import SMALL, assert_same_image, finish, run_demo

from flux.errors import InputError
from flux.images.io import save_image
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.settings.files import check_settings, read_settings
from flux.specs import configs
from flux.studio.app import open_studio
from flux.studio.forms import generate_settings, scan_settings
from flux.studio.sessions import KEEP_SECONDS, Sessions, folder_bytes, portable, read_back
from flux.studio.work.generate import run_generate
from flux.studio.work.scan import run_scan


def test_files_of_others_are_refused(tmp_path, photo):
    photo.save(tmp_path / "other.png")
    (tmp_path / "other.json").write_text('{"demo": "scan", "settings": {}}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("other.png", "other.json", "broken.json"):
        with pytest.raises(InputError, match=name):
            read_back(tmp_path / name)


def test_sessions_are_apart_and_bounded(tmp_path, photo):
    """Those that made nothing are forgotten; nobody's images are, whoever else comes."""
    sessions = Sessions(tmp_path)
    used, first = sessions.of("used"), sessions.of("first")
    used.keep_upload(photo)
    assert sessions.of("first") is first
    assert sessions.of("second").folder != first.folder
    for number in range(300):
        sessions.of(str(number))
    assert sessions.of("first") is not first
    assert sessions.of("used") is used
    with pytest.raises(InputError, match="nothing to save"):
        first.zip()


def test_sessions_are_deleted_a_day_after_their_last_use(tmp_path, photo):
    def age(session):
        os.utime(session.folder, times=(time.time() - KEEP_SECONDS - 1,) * 2)

    sessions = Sessions(tmp_path)
    old, used = sessions.of("old"), sessions.of("used")
    for session in (old, used):
        session.keep_upload(photo)
        age(session)
    assert sessions.of("used") is used
    assert old.folder.is_dir()
    sessions.tidy()
    assert used.folder.is_dir()
    assert not old.folder.exists()
    assert sessions.of("old") is not old
    assert sessions.of("used") is used
    age(used)
    Sessions(tmp_path)  # a start tidies up too
    assert not used.folder.exists()


def test_the_oldest_runs_make_room(studio, photo):
    session, settings = studio.sessions.of("a"), generate_settings(studio, {"prompt": "a dog"})
    for _ in range(3):
        session.begin_run(settings).save("000", photo, "a dog", 0)
    one = folder_bytes(session.runs[0].folder)
    session.make_room(2 * one + 10)
    assert [run.folder.name for run in session.runs] == ["001_test", "002_test"]
    assert session.begin_run(settings).folder.name == "003_test"


def test_a_run_that_grows_while_it_is_read(studio, photo):
    run = studio.sessions.of("a").begin_run(generate_settings(studio, {"prompt": "a dog"}))
    run.save("000", photo, "a dog", 0)
    reading = iter(run.images.items())
    run.save("001", photo, "a cat", 1)
    assert [name for name, _ in reading] == ["000"]
    assert list(run.images) == list(run.captions) == ["000", "001"]


def test_a_run_without_an_image_leaves_nothing(studio):
    session, settings = studio.sessions.of("a"), generate_settings(studio, {"prompt": "a dog"})
    session.stop.set()
    assert not list(run_generate(studio, session, settings))
    assert not session.runs
    assert not list(session.folder.glob("*"))


def test_an_archive_holds_every_run(studio, photo, tmp_path):
    session = studio.sessions.of("a")
    settings = generate_settings(studio, {"prompt": "a dog"})
    for _ in range(2):
        session.begin_run(settings, {"image": photo}).save("000", photo, "a dog", 0)
    with zipfile.ZipFile(session.zip()) as archive:
        files = ("000.png", "image.png", "run.json")
        assert archive.namelist() == [f"{run}/{name}" for run in ("000_test", "001_test") for name in files]
        archive.extractall(tmp_path / "home")
    read = read_settings(GenerateSettings, tmp_path / "home" / "001_test" / "run.json")
    assert read.image == str(tmp_path / "home" / "001_test" / "image.png")


def test_files_are_named_without_their_folders(tmp_path):
    (tmp_path / "a.safetensors").touch()
    loras = [{"file": str(tmp_path / "a.safetensors"), "weight": 1.0}, {"file": "owner/name", "weight": 1.0}]
    fields = portable({"weights": None, "t5_weights": f"{tmp_path}/", "lora": loras, "output_dir": "x"})
    named = [{**loras[0], "file": "a.safetensors"}, loras[1]]
    assert fields == {"weights": None, "t5_weights": tmp_path.name, "lora": named}


def test_files_of_the_server_are_not_named(studio, tmp_path, monkeypatch):
    """Neither by run.json nor by images nor by the files of a scan; the page reads these back."""
    own = {"weights": str(tmp_path / "private" / "mine.safetensors")}
    Path(own["weights"]).parent.mkdir()
    Path(own["weights"]).symlink_to(configs["flux-nano"].folder / "transformer.safetensors")
    monkeypatch.setattr(studio.engine, "settings", studio.engine.settings.model_copy(update=own))
    session = studio.sessions.of("a")
    made = finish(
        run_generate(studio, session, generate_settings(studio, {"prompt": "a dog", "num_steps": 1}))
    )
    settings = scan_settings(studio, {"prompts": "a dog", "layers": {"on": [0]}, "num_steps": 1, "top": 1})
    list(run_scan(studio, session, settings))
    folder = Path(settings.output_dir)
    given = [made.record, *made.images.values(), folder / "vital_layers.json", folder / "report.html"]
    for path in (*given, *folder.rglob("*.png")):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert read_back(made.images["000"])[0].weights == "mine.safetensors"
    list(run_scan(studio, session, settings))  # and the scan is still known as the same


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
    settings = generate_settings(studio, {"prompt": "a dog"})
    made = finish(run_generate(studio, studio.sessions.of("a"), settings))
    assert str(private) not in made.record.read_text()

    def assert_repeats(record: Path, out: Path, **more) -> None:
        assert_same_image(made.images["000"], run_demo("demo_0_test", record, out, **more) / "000.png")

    with pytest.raises(SystemExit):
        run_demo("demo_0_test", made.record, tmp_path / "lost")
    assert_repeats(made.record, tmp_path / "told", **own, lora=[{"file": lora, "weight": 0.7}])
    home = tmp_path / "home"
    home.mkdir()
    for path in (*private.iterdir(), made.record):
        (home / path.name).symlink_to(path.resolve())
    (home / nano.name).symlink_to(nano)
    assert_repeats(home / "run.json", tmp_path / "a")
    monkeypatch.chdir(home)
    assert_repeats(made.record, tmp_path / "b")


def test_an_image_beside_the_run_json_is_found(tmp_path, photo):
    save_image(photo, tmp_path / "start.png")
    data = {"demo": "test", "settings": {"prompts": ["a dog"], "image": "start.png"}}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert read_settings(GenerateSettings, tmp_path / "run.json").image == str(tmp_path / "start.png")
    assert check_settings(GenerateSettings, data["settings"]).image == "start.png"
