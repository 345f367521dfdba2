import pytest

from flux.errors import InputError
from flux.studio.strip import strip_value
from flux.studio.widgets import duration, held_image


def test_an_upload_that_was_deleted(tmp_path):
    with pytest.raises(InputError, match="upload it again") as caught:
        held_image(str(tmp_path / "gone.png"))
    assert str(tmp_path) not in str(caught.value)


def test_a_strip_knows_its_layers(studio):
    value = strip_value(studio, (2, 1), {1: 0.5})
    assert value == {"num": 15, "double": 5, "on": [1, 2], "vitality": {"1": 0.5}, "top": 0.5}
    assert strip_value(studio, (1,))["vitality"] is None


@pytest.mark.parametrize(("seconds", "text"), [(40.2, "40 s"), (180, "3 min"), (5400, "1.5 h")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
