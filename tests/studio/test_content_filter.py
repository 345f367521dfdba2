from functools import partial
from pathlib import Path

import pytest
from helpers.studio import make_classifier

from flux.content_filters import ContentFilter
from flux.errors import InputError
from flux.studio.forms import generate_settings, scan_settings
from flux.studio.work.generate import run_generate
from flux.studio.work.scan import run_scan


@pytest.fixture
def classifier(tmp_path):
    return partial(make_classifier, tmp_path / "classifier")


def test_no_image_is_shown_that_the_filter_objects_to(studio, classifier, photo):
    assert not ContentFilter.load(classifier(says=0))(photo)
    studio.engine.unsafe = ContentFilter.load(classifier(says=1))
    session, previews = studio.sessions.of("a"), []
    updates = run_generate(studio, session, generate_settings(studio, {"prompt": "a dog"}))
    with pytest.raises(InputError, match="content filter"):
        previews.extend(update.preview for update, _ in updates)
    assert not any(previews)
    assert not session.images()


def test_no_scan_shows_what_the_filter_objects_to(studio, classifier):
    studio.engine.unsafe = ContentFilter.load(classifier(says=1))
    settings = scan_settings(studio, {"prompts": "a dog", "layers": [0], "num_steps": 1})
    with pytest.raises(InputError, match="content filter"):
        list(run_scan(studio, studio.sessions.of("a"), settings))
    assert not list(Path(settings.output_dir).rglob("*.png"))
