"""A visitor's actions on the studio's page, in a browser that playwright drives."""

import re
from pathlib import Path

SECONDS = 30_000  # in milliseconds: other work may have the cores


def says(page, line, text):
    """Waits until the line of that selector has the text."""
    from playwright.sync_api import expect

    expect(page.locator(line)).to_contain_text(re.compile(text), timeout=SECONDS)


def wait_for_focus(page, layer):
    """Waits until the cell of a layer has the focus, a frame after what moved it there."""
    page.wait_for_function("layer => document.activeElement.dataset.layer === layer", arg=str(layer))


def visit(page, url, place):
    """Opens a tab of the page by its address, and waits until it is there."""
    page.goto("about:blank")  # another place of the same page would not load it anew
    page.goto(f"{url}#{place}")
    page.wait_for_function("window.studio?.ready")
    page.locator(f"[id^={place}-prompt] textarea").wait_for()


def open_tab(page, place):
    """Opens a tab of the page that is there, by its address and without loading anything anew."""
    page.evaluate("place => { location.hash = place }", place)
    page.locator(f"[id^={place}-prompt] textarea").wait_for()


def wait_until_remembered(page, text):
    """Waits until a reload brings back the text that was typed: it is noted once typing rests."""
    page.wait_for_function("text => Object.values(localStorage).some(form => form.includes(text))", arg=text)


def draw(page, prompt="a dog on the grass"):
    """Generates an image on the page, and waits until it is there."""
    page.locator("#generate-prompt textarea").fill(prompt)
    page.locator("#generate-go").click()
    says(page, "#generate-status", "Done")
    page.locator("#generate-stage img").wait_for()


def set_number(page, box, label, value):
    """Types a number into a setting behind an accordion."""
    field = page.locator(box).get_by_label(re.compile(f"^(number input for )?{label}")).first
    if not field.is_visible():
        page.locator(f"{box} button").first.click()
        field.wait_for()
        page.wait_for_timeout(500)  # what an accordion holds is filled in once more after it opened
    field.fill(str(value))
    field.press("Tab")


def paint(page, board="edit-mask"):
    """Paints a stroke on the mask canvas."""
    if not page.locator(f"#{board} canvas").is_visible():
        page.locator(f"#{board} summary").click()
    canvas = page.locator(f"#{board} canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 10, steps=5)
    page.mouse.up()


def newest_run(studio, demo) -> Path:
    """The folder of the last run of that demo's kind."""
    folders = studio.sessions.folder.rglob(f"*_{demo}")
    return max(folders, key=lambda path: (path / "run.json").stat().st_mtime)


def download(page, click) -> Path:
    """The file that a click downloads."""
    with page.expect_download() as waiting:
        click()
    return Path(waiting.value.path())


def download_image(page) -> Path:
    return download(page, lambda: page.get_by_role("button", name="Save image", exact=True).first.click())
