"""Parts that all tests share: marks, a clean environment without network, a browser, the small model."""

import gc
import importlib.util
import os
import shutil
import signal
from contextlib import nullcontext

import pytest

# Read when huggingface_hub is imported, so set before anything can import it: no test reaches a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    # Kernels run by Triton's interpreter: read when Triton is imported, as torch's compiler may do.
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import loading, tiny_models
from hypothesis import settings

# No test is timed: other work may have the cores.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A run in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SKIPPED = {"slow": "--run-slow", "gpu": "--run-gpu"}


def pytest_addoption(parser):
    for mark, option in SKIPPED.items():
        parser.addoption(option, action="store_true", help=f"run the tests marked {mark} too")


def pytest_configure():
    # Nets this small gain little from more threads, and lose a hundredfold where other work has the cores.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, option in SKIPPED.items():
            if mark in item.keywords and not config.getoption(option):
                item.add_marker(pytest.mark.skip(reason=f"runs with {option}"))


def pytest_collection_finish():
    # What has been imported stays: each search for garbage that passes through it takes half a second.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours run in one process, which makes what they share once, until another has nothing left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Scans are remembered apart from those of the person who runs the tests."""
    from matplotlib import get_cachedir

    with pytest.MonkeyPatch.context() as patch:
        # Its list of fonts takes long to make, and is the same for everyone.
        patch.setenv("MPLCONFIGDIR", get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No variable of the person who runs the tests names a file of weights."""
    for name in list(os.environ):
        if name == "AE" or name.startswith("FLUX_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Tests that train have the mark `gradients`."""
    with nullcontext() if request.node.get_closest_marker("gradients") else torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. No longer than a module: while it is there, no other event loop can run."""
    if not (CHROMIUM and importlib.util.find_spec("playwright")):
        # Where a server runs them, they are there to be run.
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse("the browser's tests need apt-get install chromium and pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def nano():
    """flux-nano's pipeline in float32 on the CPU."""
    return tiny_models.load_nano()


@pytest.fixture(scope="session")
def kept_models():
    """The models that `loads_once` has loaded."""
    return []


@pytest.fixture
def loads_once(kept_models, monkeypatch):
    """flux-nano and its kind are loaded by the first test that asks for them."""
    loading.load_once(monkeypatch, kept_models)


@pytest.fixture(scope="session")
def nano_diffusers():
    """diffusers' FluxPipeline with flux-nano's weights, tokenizers and schedule."""
    return tiny_models.load_nano_in_diffusers()
