"""The studio as its visitors meet it: the real page in headless Chromium, and the endpoints over HTTP."""

import gc
import importlib.util
import json
import os
import re
import shutil
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from flux.images.io import read_metadata, save_image

pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402
from helpers.studio import make_classifier, make_studio  # noqa: E402

from flux.studio.app import serve  # noqa: E402
from flux.studio.content_filter import ContentFilter  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAYWRIGHT = importlib.util.find_spec("playwright")
SECONDS = 30_000  # in milliseconds: other work may have the cores


@pytest.fixture(scope="module")
def studio(nano, tmp_path_factory):
    return make_studio(nano, tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def url(studio):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            patch.setenv(name, "restored afterwards")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        app, url, _ = serve(studio, "127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield url
        app.get_blocks().close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and PLAYWRIGHT):
        # Where a server runs them, they are there to be run.
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse("the browser's tests need apt-get install chromium and pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    page.set_default_timeout(SECONDS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.locator("#generate-prompt textarea").wait_for()
    yield page
    page.close()
    assert not faults


@pytest.fixture
def photo(tmp_path):
    ramp = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3)
    save_image(Image.fromarray(ramp.astype(np.uint8)), tmp_path / "photo.png")
    return tmp_path / "photo.png"


def says(page, line, text):
    from playwright.sync_api import expect

    expect(page.locator(line)).to_contain_text(re.compile(text), timeout=SECONDS)


def at_layer(page, layer):
    """Waits until the cell of a layer has the focus, a frame after what moved it there."""
    page.wait_for_function("layer => document.activeElement.dataset.layer === layer", arg=str(layer))


def draw(page, prompt="a dog on the grass"):
    page.locator("#generate-prompt textarea").fill(prompt)
    page.locator("#generate-go").click()
    says(page, "#generate-news", "Done")
    page.locator("#generate-picture img").wait_for()


def number(page, box, label, value):
    """Types a number into a setting behind an accordion."""
    field = page.locator(box).get_by_label(re.compile(f"^(number input for )?{label}")).first
    if not field.is_visible():
        page.locator(f"{box} button").first.click()
        field.wait_for()
        page.wait_for_timeout(500)  # what an accordion holds is filled in once more after it opened
    field.fill(str(value))
    field.press("Tab")


def download(page, click):
    with page.expect_download() as waiting:
        click()
    return Path(waiting.value.path())


# In the browser


def test_generate_and_what_is_saved(page, tmp_path):
    page.locator("#generate-prompt textarea").fill("a red car")
    page.keyboard.press("Enter")  # by keyboard alone
    says(page, "#generate-news", "Done")
    page.locator("#history img").first.wait_for()
    picture = download(page, lambda: page.get_by_role("button", name="Picture", exact=True).first.click())
    shutil.copy(picture, tmp_path / "saved.png")
    about = read_metadata(tmp_path / "saved.png")
    assert about["prompt"] == "a red car"
    assert about["settings"]["num_steps"] == 2
    archive = download(page, lambda: page.locator("#zip").click())
    assert archive.read_bytes()[:2] == b"PK"


def test_stop(page, studio):
    number(page, "#generate-settings", "Steps", 100)
    number(page, "#generate-settings", "Width", 256)
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    says(page, "#generate-news", "of 100")
    page.locator("#generate-picture img").wait_for()  # a preview
    page.locator("#generate-stop").click()
    says(page, "#generate-news", "Stopped")
    assert not studio.engine._lock.locked()
    page.locator("#generate-go:enabled").wait_for()


def test_a_tab_that_is_closed_stops_its_run(page, studio, client):
    number(page, "#generate-settings", "Steps", 100)
    number(page, "#generate-settings", "Width", 512)
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    says(page, "#generate-news", "of 100")
    page.goto("about:blank")
    client.predict("a dog", num_steps=1, api_name="/generate")  # has its turn: the model is free
    made = [
        path for path in studio.visits.folder.rglob("000.png") if read_metadata(path)["prompt"] == "a dog"
    ]
    assert all(read_metadata(path)["settings"]["num_steps"] < 100 for path in made)


def test_edit_with_two_layers_off_and_a_mask(page, studio):
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="Double", exact=True).locator("visible=true").click()
    page.locator("#edit-layers [data-layer='2'][aria-pressed=true]").wait_for()
    page.locator("#edit-prompt textarea").fill("a dog on the grass")
    page.locator("#edit-first").click()
    says(page, "#edit-news", "Done")
    for layer in (1, 3):
        page.locator(f"#edit-layers [data-layer='{layer}']").click()
        at_layer(page, layer)
    page.keyboard.press("ArrowLeft")
    at_layer(page, 2)
    for key, on in (("Enter", "false"), ("Space", "true")):
        page.keyboard.press(key)
        page.locator(f"#edit-layers [data-layer='2'][aria-pressed={on}]").wait_for()
        at_layer(page, 2)
    page.locator("#edit-edits textarea").fill("a cat on the grass")
    page.locator("#edit-mask button").first.click()
    canvas = page.locator("#edit-canvas canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)  # the canvas fits itself to its place
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("#edit-go").click()
    says(page, "#edit-news", "Done")
    page.locator("#edit-slider img").first.wait_for()
    [folder] = sorted(studio.visits.folder.rglob("*_edit"), key=lambda path: path.stat().st_mtime)[-1:]
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["vital_layers"] == [0, 2, 4]
    assert settings["mask"] == "mask.png"
    mask = np.asarray(Image.open(folder / "mask.png"))
    assert 0 < (mask > 0).mean() < 0.9
    page.locator("#edit-gallery button").nth(1).click()
    page.get_by_role("button", name="Go on from this edit").click()
    page.wait_for_function(
        "document.querySelector('#edit-edits textarea').value.endsWith('> a cat on the grass')"
    )


def test_edit_of_a_photograph(page, studio, photo):
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("A photograph").click()
    page.locator("#edit-photo input[type=file]").set_input_files(photo)
    page.locator("#edit-photo img").wait_for()
    says(page, "#edit-news", "Ready")
    page.locator("#edit-prompt textarea").fill("a dog")
    page.locator("#edit-edits textarea").fill("a cat")
    page.wait_for_timeout(500)
    number(page, "#edit-settings", "Width", 64)
    number(page, "#edit-settings", "Height", 64)
    page.locator("#edit-go").click()
    says(page, "#edit-news", "Done")
    folder = max(studio.visits.folder.rglob("*_edit"), key=lambda path: path.stat().st_mtime)
    assert json.loads((folder / "run.json").read_text())["settings"]["photo"] == "photo.png"
    assert np.array_equal(np.asarray(Image.open(folder / "photo.png")), np.asarray(Image.open(photo)))


def test_settings_come_back(page, url, tmp_path):
    number(page, "#generate-settings", "Seed", 77)
    draw(page, "a penguin")
    picture = download(page, lambda: page.get_by_role("button", name="Picture", exact=True).first.click())
    shutil.copy(picture, tmp_path / "mine.png")
    page.goto(url)  # another visit
    page.locator("#drop input[type=file]").set_input_files(tmp_path / "mine.png")
    page.wait_for_function("document.querySelector('#generate-prompt textarea').value === 'a penguin'")
    page.locator("#generate-settings button").first.click()
    assert page.locator("#generate-settings").get_by_label("Seed", exact=True).input_value() == "77"
    draw(page, "an owl")
    page.locator("#generate-prompt textarea").fill("")
    page.locator("#history button").first.click()  # and from this visit's pictures
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
    says(page, "#scan-news", "Done")
    page.locator("#scan-plot img").wait_for()
    says(page, "#scan-verdict", "Vital")
    page.locator("#scan-without img").nth(3).wait_for()
    assert page.locator("#scan-without img").count() == 4
    page.locator("#scan-send").click()
    page.locator("#edit-layers .cell").first.wait_for()
    on = page.locator("#edit-layers [aria-pressed=true]").all_inner_texts()
    assert 1 <= len(on) <= 3
    assert set(on) <= {"2", "7", "11"}
    assert "vitality" in page.locator("#edit-layers [data-layer='7']").get_attribute("aria-label")


def test_film(page):
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("tab", name="Step by step").click()
    page.locator("#film-go").click()
    says(page, "#film-news", "Done")
    page.locator("#film-film img").wait_for()
    page.locator("#film-sheets img").nth(2).wait_for()
    assert page.locator("#film-sheets img").count() == 3


@pytest.fixture
def filtered(studio, tmp_path, monkeypatch):
    """While the content filter objects to every picture."""
    monkeypatch.setattr(studio.engine, "unsafe", ContentFilter.load(make_classifier(tmp_path / "net")))


def test_the_content_filter_on_the_page(page, filtered):
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    page.get_by_test_id("toast-body").get_by_text("content filter").wait_for()
    page.locator("#generate-go:enabled").wait_for()
    assert page.locator("#generate-picture img").count() == page.locator("#history img").count() == 0


def test_mistakes_are_told_in_a_line(page, tmp_path):
    (tmp_path / "no.png").write_text("no picture <b>at all</b>")
    page.locator("#generate-start button").first.click()
    page.locator("#generate-image input[type=file]").set_input_files(tmp_path / "no.png")
    page.get_by_text("not a readable image").wait_for()
    assert str(tmp_path) not in page.inner_text("body")
    assert "served" not in page.inner_text("body")
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-go").click()
    page.get_by_text("Got no edit").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(page, url, scheme):
    """Nothing runs out of the window, and the window has the visitor's colours."""
    page.emulate_media(color_scheme=scheme)
    page.goto(url)
    page.locator("#generate-prompt textarea").wait_for()
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 800})
        for tab in ("Edit", "Look inside", "Generate"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 380) == (scheme == "light")


def test_examples_fill_in_at_once(page):
    """Without the server's help, so that "Edit" can be clicked at once, also twice."""
    page.get_by_role("tab", name="Edit").click()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator(".examples .gallery-item").last.click()
    page.wait_for_function("document.querySelector('#edit-edits textarea').value.startsWith('a blue car')")
    assert not [url for url in asked if "queue" in url or "/run/" in url]
    page.locator("#edit-go").dblclick()
    says(page, "#edit-news", "Done")
    assert not page.get_by_test_id("toast-body").count()


def test_unknown_words_are_named(page):
    number(page, "#generate-settings", "Steps", 1)
    draw(page, "an elefant on the grass")
    note = page.locator(".words").first
    assert re.search("elefant.*near: elephant", note.inner_text())
    draw(page, "an elephant on the grass")
    note.wait_for(state="hidden")


# Over HTTP


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


def test_client_example(url, capsys):
    spec = importlib.util.spec_from_file_location("studio_client", ROOT / "docs" / "studio_client.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(url, num_steps=2, size=64)
    assert "vital layers:" in capsys.readouterr().out


def test_warnings_come_back(client):
    how = {"num_steps": 1, "height": 64, "api_name": "/generate"}
    *_, warned = client.predict("an elefant", width=70, **how)
    assert "'elefant' (near: elephant" in warned[0]
    assert warned[1:] == ["width 70 is rounded down to 64, a multiple of 16"]
    *_, warned = client.predict("a dog", ["a catt"], width=64, **{**how, "num_steps": 2, "api_name": "/edit"})
    assert len(warned) == 1
    assert "catt" in warned[0]
    *_, warned = client.predict(["a dogg"], layers=[0], width=64, **{**how, "api_name": "/scan"})
    assert len(warned) == 1
    assert "dogg" in warned[0]
    assert client.predict("an elephant", width=64, **how)[2] == []


def test_the_content_filter_over_http(client, filtered, photo):
    how = {"width": 64, "height": 64, "num_steps": 2}
    for name, given in (
        ("generate", {"prompt": "a dog"}),
        ("generate", {"prompt": "a dog", "image": handle_file(photo)}),
        ("edit", {"prompt": "a dog", "edits": ["a cat"]}),
        ("edit", {"prompt": "a dog", "edits": ["a cat"], "photo": handle_file(photo)}),
        ("scan", {"prompts": ["a filtered dog"], "layers": [0]}),
    ):
        with pytest.raises(Exception, match="content filter"):
            client.predict(**given, **how, api_name=f"/{name}")


def test_endpoints_are_named(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/generate", "/edit", "/scan"}


def test_twenty_at_once(client, studio):
    """All are answered, one after the other, and memory stays level."""

    def round_of(count):
        jobs = [client.submit("a dog", seed=seed, num_steps=1, api_name="/generate") for seed in range(count)]
        results = [job.result(timeout=120) for job in jobs]
        gc.collect()
        return results, resident()

    _, before = round_of(5)
    results, after = round_of(20)
    assert len({pictures[0] for pictures, *_ in results}) == 20
    assert after - before < 100 * 2**20
    assert threading.active_count() < 100


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 10**6, "height": 10**6}, "1000000x1000000"),
        ({"width": -5}, "width"),
        ({"num_steps": 10**9}, "steps"),
        ({"count": 10**30}, "count"),
        ({"prompt": "a" * 50_000}, "letters"),
        ({"image": {"path": "/etc/passwd"}}, "not uploaded"),
        ({"image": {"path": "../../secret.png"}}, "not uploaded"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_refused_with_a_message(client, given, said):
    with pytest.raises(Exception, match=said):
        client.predict(**{"prompt": "a dog", **given}, api_name="/generate")
    assert client.predict("a dog", num_steps=1, api_name="/generate")


def test_uploads_over_http(client, url, studio, photo, tmp_path):
    pictures, *_ = client.predict(
        "a dog",
        ["a cat"],
        photo=handle_file(photo),
        layers=[0],
        width=64,
        height=64,
        num_steps=2,
        api_name="/edit",
    )
    assert len(pictures) == 2
    (tmp_path / "no.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(Exception, match=r"no\.png"):
        client.predict("a dog", image=handle_file(tmp_path / "no.png"), api_name="/generate")
    large = {"files": ("large.png", b"0" * (studio.limits.upload_bytes + 10**6))}
    answer = httpx.post(f"{url}gradio_api/upload", files=large, timeout=60)
    assert answer.status_code == 413
    assert httpx.get(url).status_code == 200


def test_nothing_else_is_served(url, studio):
    (studio.folder / "secret.txt").write_text("secret")
    inside = studio.visits.folder
    paths = [
        "/etc/passwd", str(ROOT / "README.md"), "README.md", str(studio.folder / "secret.txt"),
        f"{inside}/../secret.txt", f"{inside}/..%2fsecret.txt", f"{inside}/%2e%2e/secret.txt",
    ]  # fmt: skip
    for path in paths:
        answer = httpx.get(f"{url}gradio_api/file={path}")
        assert answer.status_code in (403, 404), path


def test_nothing_is_fetched_from_elsewhere(url, client):
    for path in (
        "file=http://example.com/a.png", "file/https://example.com/a.png", "file=ftp://example.com/a.png",
        "proxy=https://example.com/a.png", "deep_link?session_hash=a", "runs",
    ):  # fmt: skip
        assert httpx.get(f"{url}gradio_api/{path}").status_code == 403, path
    there = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="upload the file itself"):
        client.predict("a dog", image=there, api_name="/generate")


def test_the_queue_cannot_be_passed_by(url):
    answer = httpx.post(f"{url}gradio_api/api/generate", json={"data": ["a dog"]})
    assert answer.status_code in (401, 403, 404, 405)


def test_auth(studio):
    app, url, _ = serve(studio, "127.0.0.1", auth="me:secret", prevent_thread_lock=True, quiet=True)
    try:
        with pytest.raises(Exception, match="(?i)auth|credentials|login"):
            Client(url, verbose=False)
        assert Client(url, auth=("me", "secret"), verbose=False).predict(
            "a dog", num_steps=1, api_name="/generate"
        )
    finally:
        app.get_blocks().close(verbose=False)
