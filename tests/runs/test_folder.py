"""A folder that resumes a run with the same settings and refuses others."""

import json

import pytest

from flux.errors import InputError
from flux.runs.folder import ResumableFolder
from flux.settings.demos import GenerateSettings


@pytest.fixture
def folder(tmp_path):
    return ResumableFolder(tmp_path / "out", "test", "a run", "demo_0_test.py")


def settings(**changes) -> GenerateSettings:
    return GenerateSettings(**{"prompts": ["a dog"], "width": 64, **changes})


def test_a_new_folder_is_not_started(folder):
    assert not folder.started
    with pytest.raises(
        InputError, match=r"holds no run.json of demo_0_test.py: give the folder that it wrote"
    ):
        folder.record()


def test_the_record_holds_settings_versions_and_more(folder):
    folder.write_record(settings(), checkpoint="abc")
    assert folder.started
    record = folder.record()
    assert record["demo"] == "test"
    assert record["settings"] == settings().to_json()
    assert record["checkpoint"] == "abc"
    assert "torch" in record["versions"]


def test_equal_settings_resume(folder):
    folder.write_record(settings())
    assert folder.differences(settings(), set()) == set()
    folder.refuse(set())


def test_free_fields_may_differ(folder):
    folder.write_record(settings())
    changed = settings(batch_size=4, width=80, seed=3)
    assert folder.differences(changed, {"batch_size"}) == {"width", "seed", "prompts"}


def test_differences_are_named_in_order(folder):
    with pytest.raises(InputError, match=r"holds a run that differs in seed, width: give another output_dir"):
        folder.refuse({"width", "seed"})


def test_a_field_of_another_version_differs(folder):
    """A field that one of the two versions does not have."""
    folder.write_record(settings())
    record = folder.record()
    record["settings"] |= {"old": 1}
    del record["settings"]["width"]
    folder.record_path.write_text(json.dumps(record))
    assert folder.differences(settings(), set()) == {"old", "width"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a run's"),
        ("[]", "cannot be read as a run's"),
        ('{"demo": "test"}', "cannot be read as a run's"),
        ('{"demo": "test", "settings": []}', "cannot be read as a run's"),
        ('{"demo": "edit", "settings": {}}', "a folder of demo 'edit', expected one of demo_0_test.py"),
    ],
)
def test_a_record_of_something_else(folder, content, message):
    folder.path.mkdir()
    folder.record_path.write_text(content)
    for read in (folder.record, lambda: folder.differences(settings(), set())):
        with pytest.raises(InputError, match=message):
            read()
    assert folder.record_path.read_text() == content


def test_leftovers_are_removed_and_nothing_else(folder):
    folder.write_record(settings())
    kept = folder.path / "row" / "image.png"
    kept.parent.mkdir()
    kept.touch()
    (kept.parent / ".flux-0123.tmp").touch()
    (folder.path / ".flux-4567.tmp").touch()
    folder.remove_leftovers()
    files = {path for path in folder.path.rglob("*") if path.is_file()}
    assert files == {kept, folder.record_path}


def test_a_claimed_folder_is_resumed_with_the_same_files_alone(folder):
    folder.claim(settings(), set(), None)
    assert folder.record()["checkpoint"] is None
    folder.claim(settings(), set(), "abc")  # of files that have been downloaded since
    folder.write_record(settings(), checkpoint="abc")
    folder.claim(settings(batch_size=2), {"batch_size"}, "abc")
    folder.claim(settings(), set(), None)
    with pytest.raises(InputError, match="that differs in lora, seed: give another output_dir"):
        folder.claim(settings(seed=3), {"prompts"}, "xyz", "lora")
    assert folder.record()["checkpoint"] == "abc"
