"""The folder docs/space, which serves the studio on a Hugging Face Space."""

import os
import re
import shutil
import socket
import subprocess
import sys

import gradio_client
import pytest
from helpers.studio import ROOT

from flux.images.io import read_image


def test_the_space_installs_what_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)\]", project, re.S | re.M)[1]
    listed = (ROOT / "docs" / "space" / "requirements.txt").read_text().split()
    assert set(re.findall(r'"(.*?)"', needed)) <= set(listed)
    assert any(line.startswith("gradio") for line in listed)


@pytest.mark.slow
def test_the_space_starts_and_answers(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copytree(ROOT / "docs" / "space", tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "flux", tmp_path / "flux")  # and nothing else, as its README says
    more = {"STUDIO_MODEL": "flux-nano", "GRADIO_SERVER_PORT": str(port)}
    more |= {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    app = [sys.executable, "-u", "app.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(app, cwd=tmp_path, env={**os.environ, **more}, **pipes) as space:
        try:
            said = []
            while not said or "Running on" not in said[-1]:
                said.append(space.stdout.readline())
                assert said[-1], "".join(said)
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            size = {"width": 64, "height": 64, "num_steps": 1}
            images, *_ = client.predict("a dog", **size, api_name="/generate")
            assert read_image(images[0]).size == (64, 64)
        finally:
            space.terminate()
