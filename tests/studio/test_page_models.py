"""Pages of several models of one studio, in headless Chromium and over HTTP."""

import pytest
from gradio_client import Client
from helpers.studio import SMALL, make_studio
from helpers.studio_page import download_image, draw, says, visit

from flux.images.io import read_metadata
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.studio.engine import Engine


@pytest.fixture(scope="module")
def served(nano, tmp_path_factory):
    """A studio of two models, of which the second is not loaded."""
    studio = make_studio(nano, tmp_path_factory.mktemp("studio"))
    settings = resolve(ModelSettings(model="flux-nano-schnell", device="cpu", dtype="float32", **SMALL))
    studio.add(Engine(settings, memory=studio.engine.memory))
    return studio


def test_each_model_has_a_page(page, url, served):
    draw(page, "a dog on the grass")
    page.locator(".models summary").click()
    page.get_by_role("link", name="flux-nano-schnell").click()
    page.wait_for_url("**/flux-nano-schnell#*")
    page.wait_for_function("window.studio?.ready && document.title === 'Studio · flux-nano-schnell'")
    page.locator("#history button").wait_for()  # the images of the visit are here too
    page.get_by_role("tab", name="Generate").click()
    draw(page, "a cat in the snow")
    made = read_metadata(download_image(page))
    assert made["settings"]["model"] == "flux-nano-schnell"
    page.locator("#history button", has_text="a cat").wait_for()
    page.locator("#history button", has_text="a dog").click()  # the other model made it: its page comes
    page.wait_for_function("document.title === 'Studio · flux-nano'")
    says(page, "#generate-status", "From your images")
    assert page.locator("#generate-prompt textarea").input_value() == "a dog on the grass"
    visit(page, f"{url}flux-nano-schnell", "generate")  # each page remembers its own form
    assert page.locator("#generate-prompt textarea").input_value() == "a cat in the snow"


def test_calls_name_a_model(url, served):
    client = Client(url, verbose=False)
    first, second = client.predict(api_name="/models")
    assert (first["model"], second["model"]) == ("flux-nano", "flux-nano-schnell")
    assert first["is_loaded"]
    assert "/edit" in second["endpoints"]
    for model in (None, "flux-nano-schnell"):
        [image], _, _ = client.predict("a dog", model=model, api_name="/generate")
        assert read_metadata(image)["settings"]["model"] == (model or "flux-nano")
    with pytest.raises(Exception, match="expected flux-nano or flux-nano-schnell"):
        client.predict("a dog", model="flux-dev", api_name="/generate")
