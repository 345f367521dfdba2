"""The pages and endpoints of models that images steer, in headless Chromium and over HTTP."""

import numpy as np
import pytest
from gradio_client import Client, handle_file
from helpers.condition_models import SPECS
from helpers.conditions import draw
from helpers.steered_studio import make_steered_studio
from helpers.studio_page import SECONDS, newest_run, paint, says, visit
from PIL import Image

from flux.images.io import read_image
from flux.specs import configs
from flux.studio.app import Address, serve


@pytest.fixture(scope="module")
def serve_model(tmp_path_factory):
    """Serves a studio of one of the tiny models, and returns it and its address."""
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        for name, spec in SPECS.items():
            patch.setitem(configs, name, spec)
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            patch.setenv(name, "restored afterwards")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)

        def serving(name):
            studio = make_steered_studio(name, tmp_path_factory.mktemp(name))
            app, url, _ = serve(studio, Address("127.0.0.1"), prevent_thread_lock=True, quiet=True)
            opened.append(app)
            return studio, url

        yield serving
        for app in opened:
            app.get_blocks().close(verbose=False)


@pytest.fixture
def image_file(tmp_path):
    draw(64, 64).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def open_page(browser, url, tab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(SECONDS)
    visit(page, url, tab)
    return page


def test_fill(serve_model, browser, image_file):
    studio, url = serve_model("tiny-fill")
    page = open_page(browser, url, "fill")
    assert page.locator("#tabs [role=tab]").all_inner_texts() == ["Fill", "Edit", "LoRA", "Look inside"]
    page.locator("#fill-prompt textarea").fill("a dog")
    page.locator("#fill-image input[type=file]").set_input_files(image_file)
    page.locator("#fill-mask.empty, .painter.empty").wait_for(state="detached")
    page.get_by_label("Around the image").click()
    page.locator("#fill-frame img").wait_for()
    assert not page.locator("#fill-mask details").is_visible()
    page.locator("#fill-go").click()
    says(page, "#fill-status", "Done")
    page.locator("#fill-stage .after").wait_for()
    made = read_image(newest_run(studio, "test") / "000.png")
    assert made.size == (96, 64)
    page.get_by_role("button", name="Continue from this image").click()
    page.wait_for_function("document.querySelector('#fill-image img')?.naturalWidth === 96")
    page.get_by_label("Under a mask").click()
    page.wait_for_function("document.querySelector('#fill-mask .board img')?.naturalWidth === 96")
    paint(page, "fill-mask")
    page.locator("#fill-go").click()
    page.locator("#history button").nth(1).wait_for()
    says(page, "#fill-status", "Done")
    page.locator("#fill-mask [data-tool=clear]").click()
    page.locator("#fill-mask summary").get_by_text("Mask", exact=True).wait_for()
    page.locator("#history button").first.click()
    page.locator("#fill-mask summary").get_by_text("Mask (painted)").wait_for()
    page.close()
    client = Client(url, verbose=False)
    with pytest.raises(Exception, match="Got no border and no mask"):
        client.predict("a dog", handle_file(image_file), api_name="/fill")
    with pytest.raises(Exception, match="Cannot find a function"):
        client.predict("a dog", api_name="/generate")
    mask = image_file.with_name("mask.png")
    Image.fromarray(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(64, 0)).save(mask)
    [image], _, _ = client.predict(
        "a dog", handle_file(image_file), handle_file(mask), num_steps=1, api_name="/fill"
    )
    files = {"fill": handle_file(image_file), "mask": handle_file(mask), "layers": [0], "num_steps": 2}
    [_, edit], *_ = client.predict("a dog", ["a cat"], **files, api_name="/edit")
    assert np.array_equal(np.asarray(read_image(edit))[:, 32:], np.asarray(read_image(image_file))[:, 32:])
    with pytest.raises(Exception, match="fill without a mask"):
        client.predict(["a dog"], **{**files, "mask": None}, api_name="/scan")
    filled, before = (np.asarray(read_image(path)) for path in (image, image_file))
    assert np.array_equal(filled[:, 32:], before[:, 32:])
    assert not np.array_equal(filled[:, :32], before[:, :32])


def test_instruct(serve_model, browser, image_file):
    studio, url = serve_model("tiny-kontext")
    page = open_page(browser, url, "instruct")
    page.locator("#instruct-prompt textarea").fill("a dog at night")
    page.get_by_role("button", name="Remove all").click()
    page.locator("#instruct-contexts img").wait_for(state="detached")
    page.locator("#instruct-image input[type=file]").set_input_files(image_file)
    page.locator("#instruct-contexts img").wait_for()
    page.locator("#instruct-go").click()
    says(page, "#instruct-status", "Done")
    page.locator("#instruct-stage .after").wait_for()
    folder = newest_run(studio, "test")
    assert np.array_equal(
        np.asarray(Image.open(folder / "context_0.png")), np.asarray(Image.open(image_file))
    )
    page.locator("#instruct-image-taken button").first.click()
    page.locator("#instruct-image-visit button").first.click()
    page.locator("#instruct-contexts img").nth(1).wait_for()
    page.locator("#history button").first.click()  # brings the one context image back
    page.locator("#instruct-contexts img").nth(1).wait_for(state="detached")
    page.close()
    client = Client(url, verbose=False)
    files = [handle_file(image_file)] * 2
    [image], _, _ = client.predict("a dog", files, num_steps=1, api_name="/instruct")
    assert read_image(image).size == (64, 64)
    for context, message in (([], "no context image"), (["/etc/passwd"], "not uploaded|no field")):
        with pytest.raises(Exception, match=message):
            client.predict("a dog", context, api_name="/instruct")


def test_control(serve_model, image_file):
    _, url = serve_model("tiny-canny")
    client = Client(url, verbose=False)
    how = {"num_steps": 1, "api_name": "/generate"}
    [image], _, _ = client.predict("a dog", control=handle_file(image_file), **how)
    assert read_image(image).size == (64, 64)
    with pytest.raises(Exception, match="Got no control"):
        client.predict("a dog", **how)
    how |= {"control": handle_file(image_file), "layers": [0], "top": 1, "api_name": "/scan"}
    found, *_ = client.predict(["a dog"], **how)
    assert found["vital_layers"] == [0]
