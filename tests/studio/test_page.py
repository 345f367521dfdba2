"""The page as its visitors meet it, in headless Chromium."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.studio_page import (
    download,
    download_image,
    draw,
    paint,
    says,
    set_number,
    visit,
    wait_for_focus,
)
from PIL import Image

from flux.images.io import read_metadata


def test_generate_and_what_is_saved(page, tmp_path):
    page.locator("#generate-prompt textarea").fill("a red car")
    page.keyboard.press("Enter")  # by keyboard alone
    says(page, "#generate-status", "Done")
    page.locator("#history img").first.wait_for()
    image = download_image(page)
    shutil.copy(image, tmp_path / "saved.png")
    about = read_metadata(tmp_path / "saved.png")
    assert about["prompt"] == "a red car"
    assert about["settings"]["num_steps"] == 2
    archive = download(page, lambda: page.locator("#zip").click())
    assert archive.read_bytes()[:2] == b"PK"


def test_stop(page, served):
    set_number(page, "#generate-settings", "Steps", 100)
    set_number(page, "#generate-settings", "Width", 256)
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    says(page, "#generate-status", "of 100")
    page.locator("#generate-preview img").wait_for()
    assert not page.locator("#generate-stage").is_visible()  # the steps stand in its place
    page.locator("#generate-stop").click()
    says(page, "#generate-status", "Stopped")
    assert not served.engine.running
    page.locator("#generate-go:enabled").wait_for()


def test_a_tab_that_is_closed_stops_its_run(page, served, client):
    set_number(page, "#generate-settings", "Steps", 100)
    set_number(page, "#generate-settings", "Width", 352)
    set_number(page, "#generate-settings", "Height", 352)
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    says(page, "#generate-status", "of 100")
    page.goto("about:blank")
    client.predict("a dog", num_steps=1, api_name="/generate")  # has its turn: the model is free
    made = [
        path for path in served.sessions.folder.rglob("000.png") if read_metadata(path)["prompt"] == "a dog"
    ]
    assert all(read_metadata(path)["settings"]["num_steps"] < 100 for path in made)


def test_edit_with_two_layers_off_and_a_mask(page, served):
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="Double", exact=True).locator("visible=true").click()
    page.locator("#edit-layers [data-layer='2'][aria-pressed=true]").wait_for()
    page.locator("#edit-prompt textarea").fill("a dog on the grass")
    page.locator("#edit-reference").click()
    says(page, "#edit-status", "Done")
    for layer in (1, 3):
        page.locator(f"#edit-layers [data-layer='{layer}']").click()
        wait_for_focus(page, layer)
    page.keyboard.press("ArrowLeft")
    wait_for_focus(page, 2)
    for key, on in (("Enter", "false"), ("Space", "true")):
        page.keyboard.press(key)
        page.locator(f"#edit-layers [data-layer='2'][aria-pressed={on}]").wait_for()
        wait_for_focus(page, 2)
    page.locator("#edit-edits textarea").fill("a cat on the grass")
    paint(page)
    page.locator("#edit-go").click()
    says(page, "#edit-status", "Done")
    page.locator("#edit-viewer .after").wait_for()
    [folder] = sorted(served.sessions.folder.rglob("*_edit"), key=lambda path: path.stat().st_mtime)[-1:]
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["vital_layers"] == [0, 2, 4]
    assert settings["mask"] == "mask.png"
    mask = np.asarray(Image.open(folder / "mask.png"))
    assert 0 < (mask > 0).mean() < 0.9
    page.locator("#edit-gallery button").nth(1).click()
    page.get_by_role("button", name="Edit this").locator("visible=true").click()
    page.wait_for_function(
        "document.querySelector('#edit-edits textarea').value.endsWith('> a cat on the grass')"
    )


def test_edit_of_a_photograph(page, served, photo_file):
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("A photograph").click()
    page.locator("#edit-photo input[type=file]").set_input_files(photo_file)
    page.locator("#edit-photo img").wait_for()
    page.locator("#edit-prompt textarea").fill("a dog")
    page.locator("#edit-edits textarea").fill("a cat")
    page.wait_for_timeout(500)
    set_number(page, "#edit-settings", "Width", 64)
    set_number(page, "#edit-settings", "Height", 64)
    page.locator("#edit-go").click()
    says(page, "#edit-status", "Done")
    folder = max(served.sessions.folder.rglob("*_edit"), key=lambda path: path.stat().st_mtime)
    assert json.loads((folder / "run.json").read_text())["settings"]["photo"] == "photo.png"
    assert np.array_equal(np.asarray(Image.open(folder / "photo.png")), np.asarray(Image.open(photo_file)))


def test_settings_come_back(page, url, tmp_path):
    set_number(page, "#generate-settings", "Seed", 77)
    draw(page, "a penguin")
    image = download_image(page)
    shutil.copy(image, tmp_path / "mine.png")
    visit(page, url, "generate")
    # The form itself survives a reload, so what the file brings back must differ from it.
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value === 'a penguin'")
    page.locator("#generate-prompt textarea").fill("a frog")
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "mine.png")
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value === 'a penguin'")
    page.locator("#generate-settings button").first.click()
    assert page.locator("#generate-settings").get_by_label("Seed", exact=True).input_value() == "77"
    draw(page, "an owl")
    owl = page.locator("#history button", has_text="an owl").first  # drawn some time after the image
    owl.wait_for()
    page.locator("#generate-prompt textarea").fill("")
    owl.click()  # and from this visit's images
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value === 'an owl'")


def test_scan_of_three_layers_sent_to_edit(page):
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="None").last.click()
    page.locator("#scan-layers [aria-pressed=true]").first.wait_for(state="detached")
    # Only now: of what is typed while the tab is drawn for the first time, all was lost once.
    page.locator("#scan-prompts textarea").fill("a dog\nan owl")
    for layer in (2, 7, 11):
        page.locator(f"#scan-layers [data-layer='{layer}']").click()
    page.locator("#scan-go").click()
    says(page, "#scan-status", "Done")
    page.locator("#scan-plot img").wait_for()
    says(page, "#scan-verdict", "Vital")
    page.locator("#scan-skipped img").nth(3).wait_for()
    assert page.locator("#scan-skipped img").count() == 4
    page.locator("#scan-send").click()
    page.locator("#edit-layers .cell").first.wait_for()
    on = page.locator("#edit-layers [aria-pressed=true]").all_inner_texts()
    assert 1 <= len(on) <= 3
    assert set(on) <= {"2", "7", "11"}
    assert "vitality" in page.locator("#edit-layers [data-layer='7']").get_attribute("aria-label")


def test_film(page, url):
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("tab", name="Step by step").click()
    page.locator("#film-go").click()
    says(page, "#film-status", "Done")
    page.locator("#film-stage img").wait_for()
    sheets = page.locator("#film-sheets img")
    sheets.nth(2).wait_for()
    page.locator("#film-sheets button").first.press("Enter")  # opens it large
    page.locator("#large .shows").get_by_text("Every step").wait_for()
    page.keyboard.press("Escape")
    visit(page, url, "generate")
    page.locator("#history img").first.wait_for()
    page.locator("#history button").first.click()
    sheets.nth(2).wait_for()  # they come back with their image, and so does the film
    assert sheets.count() == 3
    assert "film.webp" in page.locator("#film-stage img").get_attribute("src")


def test_the_content_filter_on_the_page(page, filtered):
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    page.get_by_test_id("toast-body").get_by_text("content filter").wait_for()
    page.locator("#generate-go:enabled").wait_for()
    assert page.locator("#generate-stage img").get_attribute("alt") == "a dog on the grass"  # the example
    assert not page.locator("#history img").count()


def test_mistakes_are_told_in_a_line(page, tmp_path):
    (tmp_path / "no.png").write_text("no picture <b>at all</b>")
    page.locator("#generate-start button").first.click()
    page.locator("#generate-image input[type=file]").set_input_files(tmp_path / "no.png")
    page.get_by_text("not a readable image").wait_for()
    assert str(tmp_path) not in page.inner_text("body")
    assert "served" not in page.inner_text("body")
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-edits textarea").fill("")
    page.locator("#edit-go").click()
    page.get_by_text("Got no edit").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(page, url, scheme):
    """Nothing runs out of the window, and the window has the visitor's colours."""
    page.emulate_media(color_scheme=scheme)
    visit(page, url, "edit")
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 800})
        for tab in ("Edit", "Look inside", "Generate"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    visit(page, url, "film")  # by its address on a phone too: its tab is not in a menu
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 380) == (scheme == "light")


def test_examples_fill_in_at_once(page):
    """Without the server's help, so that "Edit" can be clicked at once, also twice."""
    page.get_by_role("tab", name="Edit").click()
    held: list = []
    page.route("**/gradio_api/**", lambda route: held.append(route))
    page.locator(".examples .gallery-item").last.click()
    page.wait_for_function("document.querySelector('#edit-edits textarea').value.startsWith('a blue car')")
    for route in held:
        route.continue_()
    page.unroute("**/gradio_api/**")
    page.locator("#edit-go").dblclick()
    says(page, "#edit-status", "Done")
    assert not page.get_by_test_id("toast-body").count()


def test_unknown_words_are_named(page):
    set_number(page, "#generate-settings", "Steps", 1)
    draw(page, "an elefant on the grass")
    note = page.locator(".words").first
    assert re.search("elefant.*near: elephant", note.inner_text())
    draw(page, "an elephant on the grass")
    note.wait_for(state="hidden")
