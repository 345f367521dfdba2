"""The studio alone, its page served, and a browser and a program that visit it."""

import importlib.util
import os
import shutil

import numpy as np
import pytest
from helpers.studio import make_classifier, make_studio
from helpers.studio_page import SECONDS, visit
from PIL import Image

from flux.content_filters import ContentFilter
from flux.images.io import save_image
from flux.studio.state import Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAYWRIGHT = importlib.util.find_spec("playwright")
collect_ignore_glob = [] if importlib.util.find_spec("gradio") else ["test_*.py"]


@pytest.fixture
def studio(nano, tmp_path) -> Studio:
    return make_studio(nano, tmp_path)


@pytest.fixture
def photo() -> Image.Image:
    ramp = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3)
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.fixture
def photo_file(photo, tmp_path):
    save_image(photo, tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def served(nano, tmp_path_factory) -> Studio:
    """The studio behind `url`."""
    return make_studio(nano, tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def url(served):
    from flux.studio.app import Address, serve

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            patch.setenv(name, "restored afterwards")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        app, url, _ = serve(served, Address("127.0.0.1"), prevent_thread_lock=True, quiet=True)
        yield url
        app.get_blocks().close(verbose=False)


@pytest.fixture
def filtered(served, tmp_path, monkeypatch):
    """While the content filter objects to every image."""
    monkeypatch.setattr(served.engine, "unsafe", ContentFilter.load(make_classifier(tmp_path / "classifier")))


@pytest.fixture
def client(url):
    from gradio_client import Client

    return Client(url, verbose=False)


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
    visit(page, url, "generate")
    yield page
    page.close()
    assert not faults
