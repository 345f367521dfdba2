import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from gradio_client import Client
from helpers.studio import ROOT

from flux.content_filters import ContentFilter
from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.studio.address import check_address
from flux.studio.app import open_studio


def test_the_filter_is_for_flux_1_by_default(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ContentFilter, "load", lambda name, device: asked.append(name))
    monkeypatch.setattr("flux.loaded_model.LoadedModel.load", lambda settings: None)
    for model, choice in (
        ("flux-nano", "auto"),
        ("flux-schnell", "auto"),
        ("flux-schnell", "off"),
        ("flux-nano", "x"),
    ):
        open_studio(ModelSettings(model=model, device="cpu"), tmp_path, choice)
    assert asked == ["Falconsai/nsfw_image_detection", "x"]


def test_the_model_is_loaded_in_a_thread_that_ends(monkeypatch, tmp_path):
    """One that stayed would slow down everything that computes after it."""
    threads = []
    monkeypatch.setattr(
        "flux.loaded_model.LoadedModel.load", lambda settings: threads.append(threading.current_thread())
    )
    open_studio(ModelSettings(device="cpu"), tmp_path)
    threads[0].join(10)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


def test_errors_of_loading_are_raised(monkeypatch, tmp_path):
    def refuse(settings):
        raise InputError("no such weights")

    monkeypatch.setattr("flux.loaded_model.LoadedModel.load", refuse)
    with pytest.raises(InputError, match="no such weights"):
        open_studio(ModelSettings(device="cpu"), tmp_path)


def test_defaults_that_no_run_may_have(tmp_path):
    """Said before the model is loaded: each run of the page would be refused."""
    for field, said in (("width", "a size of 100000x256"), ("num_steps", "100000 steps")):
        with pytest.raises(InputError, match=said):
            open_studio(ModelSettings(device="cpu", **{field: 100_000}), tmp_path)


def test_where_it_cannot_be_served():
    """Said before a model is loaded."""
    for auth in ("secret", ":secret", "me:", 7):
        with pytest.raises(InputError, match="user:password"):
            check_address(None, None, auth)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port in ((None, taken.getsockname()[1]), ("192.0.2.1", None), (None, 10**6), (None, "x")):
            with pytest.raises(InputError, match="Cannot serve"):
                check_address(host, port, None)
    check_address("127.0.0.1", None, "me:secret:word")


@pytest.mark.slow
def test_ctrl_c_in_a_run_ends_with_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "demo_gr.py", "--device", "cpu", "--port", str(port)]
    command += ["--output_dir", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as studio:
        while "Running on" not in (line := studio.stdout.readline()):
            assert line, studio.stderr.read()
        client = Client(f"http://127.0.0.1:{port}/", verbose=False)
        client.submit("a dog", num_steps=100, api_name="/generate")
        time.sleep(5)
        studio.send_signal(signal.SIGINT)
        _, said = studio.communicate(timeout=60)
        assert studio.returncode == 130
        assert said.strip() == "stopped; what was already written stays"
