"""Twenty visitors of a studio at once: whether all are answered, and what that costs in memory and on disk.

    python -m benchmarks.studio_load [--visitors 20] [--seconds 240]

Starts `demo_gr.py` with flux-nano and small images, and sends it what visitors send: images, edits of
prompts and of photographs, mistakes, uploads, and runs that are abandoned. Prints the numbers as JSON; ends
with Ctrl-C in a run.
"""

import json
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from flux.settings.command_line import run

SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_steps": 2}
SLOW: dict[str, Any] = {"width": 256, "height": 256, "num_steps": 100}
KINDS = (*["generate"] * 5, *["edit"] * 3, *["photo"] * 2, *["mistake"] * 2, "abandoned")


class Visitors:
    """Programs that send requests one after the other until the time is over, and what became of these."""

    def __init__(self, url: str, photo: Path, seconds: float):
        self.url, self.photo, self.end = url, photo, time.monotonic() + seconds
        self.seconds: list[float] = []
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []

    def run(self, count: int) -> None:
        """Let so many visitors come at once, and wait until all have left."""
        threads = [threading.Thread(target=self.visit, args=[number]) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def visit(self, number: int) -> None:
        """Send requests until the time is over."""
        draw = random.Random(number)
        client = self.client()
        while time.monotonic() < self.end:
            kind, begin = draw.choice(KINDS), time.monotonic()
            try:
                self.ask(client, kind, draw.randrange(100))
                self.done[kind] += 1
            except Exception as error:
                self.failed.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
            self.seconds.append(time.monotonic() - begin)
        client.close()

    def client(self) -> Client:
        """Connect. On busy cores an answer may take longer than httpx waits by default."""
        return Client(self.url, verbose=False, httpx_kwargs={"timeout": 60})

    def ask(self, client: Client, kind: str, seed: int) -> None:
        """Send one request. Raise an error if the answer is not what it should be."""
        if kind == "abandoned":
            data = {"data": ["a dog", seed, 1, *SLOW.values(), None, None, "", None, 0.8]}
            address = f"{self.url}gradio_api/call/generate"
            event = httpx.post(address, json=data, timeout=60).json()["event_id"]
            with httpx.stream("GET", f"{address}/{event}", timeout=60):
                time.sleep(1)
        elif kind == "mistake":
            try:
                client.predict("a dog", ["a cat"], seed=seed, width=10**4, api_name="/edit")
            except Exception as error:
                if "choose a smaller one" not in str(error):
                    raise
            else:
                raise RuntimeError("a mistake was not refused")
        elif kind == "generate":
            images, *_ = client.predict("a dog", seed=seed, **SIZE, api_name="/generate")
            assert len(images) == 1
        else:
            how: dict[str, Any] = {"photo": handle_file(self.photo)} if kind == "photo" else {}
            images, *_ = client.predict(
                "a dog on the grass", ["a cat on the grass"], seed=seed, **how, **SIZE, api_name="/edit"
            )
            assert len(images) == 2


def resident(process: subprocess.Popen) -> int:
    """Return the megabytes of a process in main memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024


def watch(process: subprocess.Popen, until: threading.Event) -> list[int]:
    """List the process's megabytes, every five seconds."""
    found = []
    while not until.wait(5):
        found.append(resident(process))
    return found


def on_disk(folder: Path) -> dict[str, Any]:
    """Count what the studio has written: runs, and those without an image; copies served; broken uploads."""
    runs = [path.parent for path in folder.glob("visits/*/*/run.json")]
    return {
        "runs": len(runs),
        "runs_without_image": sum(not list(run.glob("[0-9r]*.png")) for run in runs),
        "visits_mb": megabytes(folder / "visits"),
        "served_mb": megabytes(folder / "served"),
        "previews": len(list(folder.glob("served/*/image.*"))),
        "broken_uploads": len([path for path in (folder / "served").glob("*") if path.is_file()]),
    }


def megabytes(folder: Path) -> float:
    """Sum up the files of a folder."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20, 1)


class Server:
    """A studio with flux-nano, in a process of its own. It is started, and serves when it is made.

    Args:
        folder: The folder that it writes to.
    """

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-u", "demo_gr.py", "--device", "cpu", "--port", str(port)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([*command, "--output_dir", str(folder)], **pipes)
        output, self.lines = self.process.stdout, list[str]()
        assert output
        while not self.lines or "Running on" not in self.lines[-1]:
            self.lines.append(output.readline())
            if not self.lines[-1]:
                sys.exit("".join(self.lines))
        self.reader = threading.Thread(target=lambda: self.lines.extend(output), daemon=True)
        self.reader.start()

    def interrupt(self) -> int:
        """End it as Ctrl-C does. Return the exit status."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(30)
        self.reader.join(5)
        return status


def main(visitors: int = 20, seconds: float = 240) -> None:
    """Start a studio, let visitors come, and print the numbers.

    Args:
        visitors: how many come at once
        seconds: how long they stay
    """
    folder = Path(tempfile.mkdtemp(prefix="studio"))
    photo = folder / "photo.png"
    Image.fromarray(np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3).astype(np.uint8)).save(photo)
    server = Server(folder / "studio")
    requests = Visitors(server.url, photo, seconds)
    over, memory = threading.Event(), []
    watcher = threading.Thread(target=lambda: memory.extend(watch(server.process, over)))
    watcher.start()
    requests.run(visitors)
    over.set()
    watcher.join()
    requests.client().submit("a dog", **SLOW, api_name="/generate")
    time.sleep(2)
    status = server.interrupt()
    result = {
        "visitors": visitors,
        "seconds": seconds,
        "answered": dict(requests.done),
        "failed": requests.failed,
        "median_s": round(statistics.median(requests.seconds), 1),
        "slowest_s": round(max(requests.seconds), 1),
        "memory_mb": memory[:: max(1, len(memory) // 12)],
        "disk": on_disk(folder / "studio"),
        "exit_status_after_ctrl_c": status,
        "last_lines": [line.rstrip() for line in server.lines[-3:]],
    }
    print(json.dumps(result, indent=2))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main, __doc__)
