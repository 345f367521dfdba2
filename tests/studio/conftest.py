"""The studio alone, its page served, and a window and a program that visit it."""

import importlib.util

import numpy as np
import pytest
from helpers.studio import make_classifier, make_studio
from helpers.studio_page import SECONDS, visit
from PIL import Image

from flux.content_filters import ContentFilter
from flux.images.io import save_image
from flux.studio.state import Studio

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
    """The address of the page, which is served as long as a file's tests last."""
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
    """A program that calls the endpoints."""
    from gradio_client import Client

    return Client(url, verbose=False)


@pytest.fixture(scope="module")
def window(browser, url):
    """A browser's window: it reads the page's scripts once, which takes longer than most tests."""
    return browser.new_page(accept_downloads=True)


@pytest.fixture
def page(window, url):
    """The page as somebody sees it who has never been here."""
    window.goto(f"{url}robots.txt")  # nothing of the page runs there, to remember more
    window.evaluate("localStorage.clear(); sessionStorage.clear()")
    window.set_viewport_size({"width": 1400, "height": 1000})
    window.emulate_media(color_scheme="light")
    window.set_default_timeout(SECONDS)
    faults: list[str] = []
    note = lambda error: faults.append(str(error))  # noqa: E731
    window.on("pageerror", note)
    visit(window, url, "generate")
    yield window
    window.remove_listener("pageerror", note)
    assert not faults
