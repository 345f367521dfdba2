import pytest
from PIL import Image

from flux.studio.viewer import divider, image_alone, pair


@pytest.mark.parametrize(("left", "right", "at"), [(20, 60, 20), (0, 8, 5), (100, 200, 75), (0, 200, 50)])
def test_the_divider_opens_in_the_middle_of_what_changed(left, right, at):
    before = Image.new("RGB", (200, 100), "green")
    after = before.copy()
    after.paste("red", (left, 30, right, 80))
    assert divider(before, after) == pytest.approx(at, abs=2)
    assert divider(before, before) == 50


def test_prompts_are_text_and_no_markup(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    value = image_alone(tmp_path / "a.png", '<img src=x onerror="1">')
    assert value["after_shows"] == "&lt;img src=x onerror=&quot;1&quot;&gt;"
    assert value["ratio"] == 1.5
    both = pair(tmp_path / "a.png", "<b>", tmp_path / "a.png", "'", None)
    assert (both["before_shows"], both["mask"], both["at"]) == ("&lt;b&gt;", None, 50)
