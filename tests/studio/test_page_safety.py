"""A visitor's own files and words, shown on the page, run no code; the page's own parts are not refused."""

import json

from helpers.studio_page import draw, says, set_number

MARKUP = "<img src=x onerror='window.hit=1'>"


def test_no_error_on_the_console(browser, url):
    """Under the policy that the server sends, the whole page works."""
    page, faults = browser.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(url)
    for tab in ("Generate", "Edit", "Look inside"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
    page.get_by_role("tab", name="Generate").click()
    draw(page)
    page.close()
    assert not faults


def test_files_and_words_are_shown_as_they_are(page, tmp_path):
    record = {"demo": "test", "settings": {"prompts": [MARKUP], "model": MARKUP}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "run.json")
    page.get_by_test_id("toast-body").get_by_text(MARKUP).wait_for()
    (tmp_path / f"{MARKUP.replace('/', '')}.json").write_text("{}")
    page.get_by_role("tab", name="Generate").click()
    page.locator("#generate-prompt textarea").fill(f"a dog {MARKUP}")
    page.locator("#generate-go").click()
    says(page, "#generate-status", "Done")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hit") is None


def test_a_run_that_waits_is_stopped(page, served):
    """It says who is before it, and Stop takes it out of the line."""
    page.get_by_role("tab", name="Generate").click()
    page.locator("#generate-prompt textarea").fill("a dog")
    with served.line.join("another", "edit") as first:
        list(served.line.wait(first))
        page.locator("#generate-go").click()
        says(page, "#generate-status", "next in line")
        page.locator("#generate-stop").click()
        says(page, "#generate-status", "Stopped")
        page.locator("#generate-go:enabled").wait_for()
        assert not first.stop.is_set()


def test_what_is_saved_after_stop(page):
    """Not the image before, whose place a preview has taken."""
    page.get_by_role("tab", name="Generate").click()
    save = page.get_by_role("button", name="Save image", exact=True).locator("visible=true")
    draw(page)
    assert save.is_enabled()
    set_number(page, "#generate-settings", "Steps", 100)
    set_number(page, "#generate-settings", "Width", 512)
    page.locator("#generate-go").click()
    says(page, "#generate-status", "of 100")
    page.locator("#generate-stop").click()
    says(page, "#generate-status", "Stopped")
    assert save.is_disabled()


def test_two_runs_of_one_page(page, served):
    page.get_by_role("tab", name="Generate").click()
    page.locator("#generate-prompt textarea").fill("a dog")
    with served.line.join("another", "edit") as first:
        list(served.line.wait(first))
        page.locator("#generate-go").click()
        says(page, "#generate-status", "next in line")
        page.get_by_role("tab", name="Look inside").click()
        page.get_by_role("tab", name="Step by step").click()
        page.locator("#film-go").click()
        says(page, "#film-status", "2 runs before yours")
    says(page, "#film-status", "Done")
    page.get_by_role("tab", name="Generate").click()
    says(page, "#generate-status", "Done")
