"""The page in use: its first minute, what it remembers and notes, images large, and use by everybody."""

import json
import os

import numpy as np
import pytest
from helpers import lora_files
from helpers.studio import assert_same_image
from helpers.studio_page import (
    SECONDS,
    draw,
    newest_run,
    open_tab,
    says,
    set_number,
    visit,
    wait_until_remembered,
)
from helpers.waiting import until
from PIL import Image
from safetensors.torch import save_file

PAINTED = """() => {
  const canvas = document.querySelector("#edit-mask canvas");
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((level, i) => i % 4 == 3 && level > 127).length / (canvas.width * canvas.height);
}"""


def test_an_example_is_there_before_anything_is_computed(page):
    open_tab(page, "edit")
    viewer, gallery = page.locator("#edit-viewer"), page.locator("#edit-gallery")
    images = viewer.locator("img:not(.mask)")
    shown = images.evaluate_all("images => images.map(image => [image.alt, image.naturalWidth])")
    assert shown == [["Before: a dog on the grass", 256], ["After: a cat on the grass", 256]]
    assert gallery.locator(".selected img").get_attribute("alt") == "a cat on the grass"
    assert viewer.get_by_text("Before", exact=True).is_visible()
    assert viewer.get_by_text("After", exact=True).is_visible()
    divider = viewer.get_by_role("slider")
    assert 20 < int(divider.input_value()) < 45  # through the animal, which stands on the left
    place = int(divider.input_value())
    divider.press("ArrowRight")
    style = viewer.locator("figure").get_attribute("style")
    assert f"--at: {place + 1}%" in style
    viewer.get_by_label("Dim what had to stay").check()
    assert viewer.locator(".mask").is_visible()
    gallery.locator("button").nth(3).click()
    viewer.get_by_alt_text("After: a dog in the snow").wait_for()
    assert viewer.locator("input[type=checkbox]").count() == 0  # the whole image may change


def test_the_mask_that_was_found_is_corrected_sent_back_and_shared(page, url, served, browser):
    open_tab(page, "edit")
    page.locator("#edit-correct").click()
    page.wait_for_function(f"({PAINTED})() > 0.05")
    page.wait_for_function("document.activeElement.closest('#edit-mask')")  # the page has moved there
    found = page.evaluate(PAINTED)
    page.get_by_role("button", name="Erase").click()
    box = page.locator("#edit-mask canvas").bounding_box()
    page.mouse.move(box["x"], box["y"] + 0.7 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    assert 0 < page.evaluate(PAINTED) < found
    corrected = page.evaluate(PAINTED)
    page.locator("#edit-go").click()
    says(page, "#edit-status", "Done")
    mask = np.asarray(Image.open(newest_run(served, "edit") / "mask.png"))
    assert (mask > 0).mean() == pytest.approx(corrected, abs=0.05)
    page.reload()  # an item of the history brings it back,
    page.locator("#history button").nth(1).click()
    page.get_by_text("Mask (painted)").wait_for()
    page.wait_for_function("document.activeElement.classList.contains('outputs')")
    beside = page.locator("#edit-viewer").locator("xpath=..")
    image = beside.get_by_role("button", name="Save image", exact=True)
    with page.expect_download() as waiting:
        image.click()
    file = waiting.value.path().rename(waiting.value.path().with_suffix(".png"))
    other = browser.new_page()  # and so does the image alone, elsewhere
    other.set_default_timeout(SECONDS)
    visit(other, url, "generate")
    other.locator("#drop input[type=file]").set_input_files(file)
    other.get_by_text("Mask (painted)").wait_for()
    assert other.url.endswith("#edit")
    other.close()


def test_form_and_images_survive_a_reload_and_tabs_are_in_the_address(page):
    set_number(page, "#generate-settings", "Seed", 77)
    draw(page, "an owl")
    wait_until_remembered(page, "an owl")
    page.reload()
    page.locator("#history img").wait_for()
    prompt = page.locator("#generate-prompt textarea")
    assert prompt.input_value() == "an owl"
    page.locator("#generate-settings button").first.click()
    seed = page.locator("#generate-settings").get_by_label("Seed", exact=True)
    assert seed.input_value() == "77"
    prompt.fill("a parrot")
    wait_until_remembered(page, "a parrot")
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value === 'an owl'")
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("tab", name="Step by step").click()
    page.wait_for_url("**#film")
    page.go_back()
    page.locator("#scan-prompts").wait_for()
    page.go_back()
    page.locator("#generate-prompt").wait_for()
    page.go_forward()
    page.locator("#scan-prompts").wait_for()


def test_what_is_wrong_or_without_effect_is_said_beside_its_field(page):
    settings = page.locator("#generate-settings")
    set_number(page, "#generate-settings", "Seed", -3)
    settings.get_by_text("Expected at least 0, got -3.").wait_for()
    page.locator("#generate-go").click()
    page.get_by_test_id("toast-body").get_by_text("seed").wait_for()
    set_number(page, "#generate-settings", "Seed", 3)
    settings.get_by_text("The same seed repeats the image.").wait_for()
    settings.get_by_label("Negative prompt").fill("snow")
    settings.get_by_text("Without effect: true_cfg is 1.").wait_for()
    page.get_by_role("button", name="16:9").locator("visible=true").click()
    sides = [settings.get_by_label(f"number input for {side}") for side in ("Width", "Height")]
    page.wait_for_function("document.querySelector('#generate-settings [aria-label*=Width]').value === '336'")
    assert [side.input_value() for side in sides] == ["336", "192"]
    set_number(page, "#generate-settings", "Width", 512)
    set_number(page, "#generate-settings", "Height", 512)  # more than is accepted: the width yields
    until(lambda: sides[0].input_value() == "256")
    set_number(page, "#generate-settings", "Width", 100_000)
    page.wait_for_function(
        "document.querySelector('#generate-settings [aria-label*=Height]').value === '256'"
    )
    set_number(page, "#generate-settings", "Seed", 10**30)
    page.locator("#generate-go").click()
    page.get_by_test_id("toast-body").get_by_text("Seed: expected a number of at most 18 digits").wait_for()


def test_several_images_are_a_grid_and_each_can_be_edited(page, served):
    set_number(page, "#generate-settings", "Images", 2)
    draw(page, "a penguin")
    grid = page.locator("#generate-gallery button")
    grid.nth(1).wait_for()
    grid.first.click()
    page.wait_for_function("document.querySelector('#generate-stage img').src.includes('000.png')")
    drawn = newest_run(served, "test") / "000.png"
    page.get_by_role("button", name="Edit this").locator("visible=true").click()
    page.wait_for_function("document.activeElement.closest('#edit-edits')")
    assert page.locator("#edit-prompt textarea").input_value() == "a penguin"
    page.locator("#edit-edits textarea").fill("an owl")
    page.locator("#edit-go").click()
    says(page, "#edit-status", "Done")
    assert_same_image(newest_run(served, "edit") / "reference.png", drawn)


def test_images_open_large_and_zoom_by_keys(page):
    open_tab(page, "edit")
    page.get_by_role("button", name="Open large").locator("visible=true").press("Enter")
    image = page.locator("#large img")
    page.wait_for_function("document.querySelector('#large img').naturalWidth === 256")
    width = image.bounding_box()["width"]
    assert width > 600
    page.keyboard.press("+")
    assert image.bounding_box()["width"] == pytest.approx(1.5 * width, rel=0.02)
    page.keyboard.press("ArrowRight")
    page.get_by_alt_text("Before: a dog on the grass").locator("visible=true").first.wait_for()
    page.keyboard.press("Escape")
    image.wait_for(state="hidden")


def test_copies_and_words(page, url, browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    visit(page, url, "edit")
    page.get_by_role("button", name="Copy as command").locator("visible=true").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("python demo_4_edit.py edit.json")
    page.get_by_role("link", name="Dose?").click()
    page.wait_for_function("document.activeElement.id === 'word-dose'")
    context.close()


LORA_MODULES = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.2.linear1")


@pytest.fixture(scope="module")
def lora(nano, tmp_path_factory):
    """A LoRA in layers 0, 1 and 7 of flux-nano."""
    path = tmp_path_factory.mktemp("lora") / "mine.safetensors"
    chosen = lora_files.pairs(nano.model.state_dict(), LORA_MODULES)
    file = lora_files.file_of(chosen, lambda name: f"diffusion_model.{name}", 4.0)
    save_file(file, path, metadata={"modelspec.title": "<b>mine</b>"})
    return path


def drop(page, lora):
    page.locator("#lora-file input[type=file]").set_input_files(lora)
    page.locator("#lora-layers .slider").nth(2).wait_for()


def compare(page):
    page.locator("#lora-go").click()
    says(page, "#lora-status", "Done")
    page.locator("#lora-stage .after").wait_for()


def lora_of_newest_run(served):
    [lora] = json.loads((newest_run(served, "test") / "run.json").read_text())["settings"]["lora"]
    return lora


def test_a_lora_is_dropped_and_compared(page, served, lora):
    open_tab(page, "lora")
    drop(page, lora)
    says(page, "#lora-status", "mine.safetensors changes 3 of 15 layers")
    page.locator("#lora-layers [data-layer='0'][aria-label='layer 0, vital']").wait_for()
    compare(page)
    assert lora_of_newest_run(served) == {"file": "mine.safetensors", "weight": 1.0}
    runs = len(list(served.sessions.folder.rglob("*_test")))
    page.locator("#lora-layers .cell[data-layer='7']").click()
    page.locator("#lora-layers .cell[data-layer='7'][aria-pressed=false]").wait_for()
    slider = page.locator("#lora-layers input[data-layer='1']")
    for _ in range(2):  # by keys; the focus stays on it
        slider.press("ArrowLeft")
        page.wait_for_function("document.activeElement.matches('#lora-layers input[data-layer=\"1\"]')")
    says(page, "#lora-layers .slider:has(input[data-layer='1']) output", "0.90")
    compare(page)
    page.wait_for_function("document.querySelectorAll('#history img').length === 3")
    assert lora_of_newest_run(served)["layers"] == {"1": 0.9, "7": 0.0}
    assert len(list(served.sessions.folder.rglob("*_test"))) == runs + 1, "the one without it is kept"
    on = "#lora-layers .cell[aria-pressed=true]"
    groups = {"Vital": ["0"], "Not vital": ["1", "7"], "None": [], "All": ["0", "1", "7"]}
    for group, layers in groups.items():
        page.get_by_role("button", name=group, exact=True).locator("visible=true").click()
        page.wait_for_function(
            "([on, count]) => document.querySelectorAll(on).length === count", arg=[on, len(layers)]
        )
        assert page.locator(on).all_inner_texts() == layers


def test_an_image_with_a_lora_brings_its_settings_back(page, url, lora):
    open_tab(page, "lora")
    drop(page, lora)
    page.locator("#lora-prompt textarea").fill("a cat in the snow")
    compare(page)
    visit(page, url, "generate")
    page.locator("#history img").first.click()
    says(page, "#lora-status", "Made with mine.safetensors")
    page.wait_for_function("document.querySelector('#lora-prompt textarea').value === 'a cat in the snow'")
    page.get_by_role("button", name="Edit this").locator("visible=true").click()
    page.locator("#edit-photo img").wait_for()  # its prompt alone would not draw it again


def test_a_lora_is_trained(page, served, photo, tmp_path):
    images = [tmp_path / f"{number}.png" for number in range(3)]
    for image in images:
        photo.save(image)

    def wait_until_kept(count):
        until(lambda: len(list(served.sessions.folder.rglob("uploads/training/*.png"))) == count)

    open_tab(page, "lora")
    set_number(page, "#lora-train", "Training steps", 2)  # behind an accordion
    page.locator("#lora-images input[type=file]").set_input_files(images)
    page.locator("#lora-images a").nth(2).wait_for()
    wait_until_kept(3)
    page.locator("#lora-images .file-preview button").last.click()  # removes the last one
    wait_until_kept(2)
    page.locator("#lora-learn").click()
    page.locator("#lora-layers .slider").first.wait_for(timeout=4 * SECONDS)  # other work may have the cores
    says(page, "#lora-status", "Done")
    assert page.locator("#lora-samples img").count() == 4
    page.locator("#lora-file").get_by_text("trained").wait_for()
    compare(page)
    assert lora_of_newest_run(served)["file"] == "trained.safetensors"


def test_what_is_no_lora(page, lora, tmp_path):
    (tmp_path / "none.safetensors").write_text("not a LoRA, not a LoRA")
    open_tab(page, "lora")
    page.locator("#lora-go").click()
    says(page, ".toast-wrap", "Got no LoRA")
    page.locator("#lora-file input[type=file]").set_input_files(tmp_path / "none.safetensors")
    says(page, ".toast-wrap", "none.safetensors, which is no LoRA")
    drop(page, lora)  # the field is empty again
    assert page.locator("#lora-facts b").count() == 0, "its texts are no HTML"


@pytest.mark.parametrize(
    ("scheme", "places"),
    [("light", ("edit", "generate", "lora", "film", "scan")), ("dark", ("edit", "lora", "film"))],
)
def test_it_is_accessible(page, url, lora, scheme, places):
    """No serious finding of axe, with everything unfolded; in the dark only contrasts are others."""
    if not os.environ.get("CI"):
        pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    visit(page, url, "generate")
    options: dict = {"resultTypes": ["violations"]}
    if scheme == "dark":
        options["runOnly"] = ["color-contrast"]
    findings = []
    for place in places:
        open_tab(page, place)
        if place == "lora":
            drop(page, lora)
            page.locator("#lora-layers .cell").nth(1).click()
        for fold in page.locator("button.label-wrap:visible, summary:visible").all():
            fold.click()
        page.wait_for_timeout(700)  # accordions unfold, fields fade in
        found = Axe().run(page, options=options).response["violations"]
        findings += [
            (place, each["id"], [node["html"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
    assert not findings
