"""The studio as a whole: loads the model, builds the page and serves it."""

import asyncio
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from flux.content_filters import DEFAULT, ContentFilter
from flux.errors import InputError
from flux.runtime.devices import return_freed_memory
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import get_spec
from flux.studio.engine import Engine
from flux.studio.guard import Front
from flux.studio.limits import Limits
from flux.studio.line import Line
from flux.studio.sessions import Disk, Sessions, delete_unused, folder_bytes
from flux.studio.state import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI

    from flux.studio.hardening import Page

HOUSE_SECONDS = 60.0  # between two times of tidying up
PREVIEW_SECONDS = 120.0  # until a preview's file is deleted
SCAN_SECONDS = 7 * 24 * 3600.0  # from a scan's last use until it is deleted

T = TypeVar("T")


def open_studio(
    settings: ModelSettings,
    folder: str | Path = "output/studio",
    content_filter: str = "auto",
    track_usage: bool = False,
    publish_scans: bool = False,
) -> Studio:
    """Loads the model and the content filter.

    Args:
        settings: The model, and the page's defaults.
        folder: Where the studio writes.
        content_filter: "auto" (upstream's classifier for FLUX.1 models, none for flux-nano), "off", or an
            image classifier by hub name or folder.
        track_usage: Whether to report each image to Black Forest Labs.
        publish_scans: Whether the layers that a visitor's scan finds become the default of everybody.

    Raises:
        InputError: As `Pipeline.load` and `ContentFilter.load`.
    """
    from flux.pipeline import Pipeline
    from flux.runtime.devices import pick_device

    resolved = resolve(settings)
    spec = get_spec(resolved.model)
    if content_filter == "auto":
        # The small model has seen no people.
        content_filter = "off" if spec.folder else DEFAULT
    device = pick_device(resolved.device)

    def load() -> Engine:
        unsafe = None if content_filter == "off" else ContentFilter.load(content_filter, device)
        return Engine(resolved, Pipeline.load(resolved), unsafe)

    folder, engine = Path(folder).resolve(), _in_a_thread(load)
    limits = Limits.of(spec)
    return Studio(
        engine,
        limits,
        Sessions(folder / "visits"),
        folder,
        track_usage,
        publish_scans,
        Line(limits.waiting, limits.waiting_each),
        disk=Disk(limits.disk_bytes),
    )


def _in_a_thread(work: Callable[[], T]) -> T:
    """Does the work in a thread that ends with it, and returns the result.

    OpenMP keeps threads for every thread that has computed, as long as that thread lives, and wakes them
    less eagerly once there are more of them than cores: those of the main thread would slow down every run.
    """
    done: Future[T] = Future()

    def follow() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # A daemon, so that Ctrl-C does not wait for it.
    threading.Thread(target=follow, daemon=True).start()
    return done.result()


def check_address(host: str | None, port: int | None, auth: str | None) -> None:
    """Checks, before a model is loaded, that `serve` can serve.

    Args:
        host: The address to serve at.
        port: The port to serve at.
        auth: "user:password".

    Raises:
        InputError: The address cannot be used, or `auth` lacks a user or a password.
    """
    if auth is not None and not all(str(auth).partition(":")):
        raise InputError('Got auth without a colon or with an empty side: expected "user:password"')
    address = (str(host or "127.0.0.1").strip("[]"), port or 0)
    try:
        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, OverflowError, TypeError) as error:
        raise InputError(
            f"Cannot serve at {address[0]}:{port}: {error}; give another --host or --port"
        ) from error


def check_tls(certfile: str | None, keyfile: str | None) -> None:
    """Raises InputError unless there are both a certificate and its key, or neither."""
    if (certfile is None) != (keyfile is None):
        raise InputError("Got only one of ssl_certfile and ssl_keyfile: give both, or neither")
    if certfile and keyfile:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile)
        except OSError as error:
            raise InputError(
                f"Got {certfile} and {keyfile}, which are no certificate and key: {error}"
            ) from error


@dataclass(frozen=True)
class Address:
    """Where and how the studio is served.

    Attributes:
        host: The address to serve at. If None, this machine alone is served.
        port: The port to serve at. If None, a free one from 7860 on.
        share: Whether to open a public link through gradio's servers.
        auth: "user:password", asked for before anything is shown.
        ssl_certfile: File of the TLS certificate.
        ssl_keyfile: File of its key.
        root_path: Path or whole address under which a proxy serves the studio.
        allowed_hosts: Further names of the studio, as of a proxy.
    """

    host: str | None = None
    port: int | None = None
    share: bool = False
    auth: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    root_path: str | None = None
    allowed_hosts: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises InputError as `check_address` and `check_tls`. Called before a model is loaded."""
        check_address(self.host, self.port, self.auth)
        check_tls(self.ssl_certfile, self.ssl_keyfile)

    def front(self) -> Front:
        """Returns the names that the studio is reached under."""
        names = [self.host, urlsplit(self.root_path or "").hostname, os.environ.get("SPACE_HOST")]
        hosts = [*self.allowed_hosts, *filter(None, names), *[".gradio.live"] * self.share]
        frames = ["https://huggingface.co"] if "SPACE_HOST" in os.environ else []
        return Front(tuple(host.strip("[]").lower() for host in hosts), tuple(frames), self.share)


def serve(studio: Studio, address: Address | None = None, **more: Any) -> tuple["FastAPI", str, str | None]:
    """Builds the page and serves it until Ctrl-C.

    Args:
        studio: The studio.
        address: Where and how it is served. If None, this machine alone is served.
        more: Further arguments of gradio's `launch`. With `prevent_thread_lock` it returns at once.

    Returns:
        As gradio's `launch`: the app, its local address and its public one.

    Raises:
        InputError: As `Address.check`.
        KeyboardInterrupt: Ctrl-C, once the running work has ended.
    """
    address = address or Address()
    address.check()
    served = studio.folder / "served"
    # Read when components are made: uploads, and copies of what is shown, are written and served here.
    os.environ["GRADIO_TEMP_DIR"] = str(served)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(served / "examples")
    # gradio deletes its own files only, not those of a studio that was killed.
    delete_unused(served)
    # Pillow refuses more than twice this many pixels, also where gradio opens what a browser sent.
    Image.MAX_IMAGE_PIXELS = studio.limits.upload_pixels

    from starlette.middleware import Middleware

    from flux.studio.guard import Guard
    from flux.studio.hardening import OwnFilesOnly
    from flux.studio.page import build, theme

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        # Around gradio's own middleware, which would answer other sites' pages.
        app.middleware_stack = Guard(
            app.middleware_stack,
            address.front(),
            studio.callers,
            studio.limits.file_bytes,
            studio.disk,
        )
        keeping = asyncio.create_task(_keep_house(studio, app))
        yield
        keeping.cancel()

    page = build(studio)
    # Runs wait in the studio's own line. Without api_open=False, requests to bare routes would bypass it.
    page.queue(max_size=studio.limits.waiting, api_open=False, default_concurrency_limit=8)
    user, _, password = (address.auth or "").partition(":")
    is_blocking = not more.pop("prevent_thread_lock", False)
    try:
        launched = page.launch(
            server_name=address.host,
            server_port=address.port,
            share=address.share,
            auth=(user, password) if address.auth else None,
            ssl_certfile=address.ssl_certfile,
            ssl_keyfile=address.ssl_keyfile,
            ssl_verify=False,  # gradio asks itself whether it has started, by another name
            root_path=address.root_path,
            allowed_paths=[str(studio.sessions.folder), str(studio.folder / "scans")],
            max_file_size=studio.limits.file_bytes,
            max_threads=studio.limits.waiting + 40,  # each waiting run has a thread
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            app_kwargs={
                "middleware": [Middleware(OwnFilesOnly, folder=studio.folder)],
                "lifespan": lifespan,
            },
            **{**theme(), **more},
        )
    except OSError as error:
        place = f"{address.host or '127.0.0.1'}:{address.port or '7860 and up'}"
        raise InputError(f"Cannot serve at {place}: {error}") from error
    if is_blocking:
        _serve_until_interrupted(studio, page)
    return launched


def _serve_until_interrupted(studio: Studio, page: "Page") -> None:
    """Waits for Ctrl-C, then ends the running work within a step.

    Python cannot end while another thread computes: it would abort.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        while page.is_running:
            time.sleep(0.2)
    except KeyboardInterrupt:
        ended = studio.line.close()
        page.close(verbose=False)
        if not ended:
            print("\nstopped in the middle of a step; what was already written stays", file=sys.stderr)
            os._exit(130)
        raise


async def _keep_house(studio: Studio, app: Any) -> None:
    """Deletes what nobody needs any more, once a minute."""
    while True:
        try:
            for name in studio.callers.forget_idle():
                # gradio would keep the state of ten thousand sessions.
                app.state_holder.session_data.pop(name, None)
                app.state_holder.time_last_used.pop(name, None)
            await asyncio.to_thread(tidy, studio)
        except OSError as error:
            print(f"error: the studio cannot tidy its folder: {error}", file=sys.stderr)
        await asyncio.sleep(HOUSE_SECONDS)


def tidy(studio: Studio) -> None:
    """Deletes unused files of visits and scans, and previews; counts the rest; gives memory back."""
    studio.sessions.tidy()
    delete_unused(studio.folder / "scans", SCAN_SECONDS)
    delete_unused(studio.folder / "served")
    # gradio writes every preview to a file of this name. A page reads it at once.
    oldest = time.time() - PREVIEW_SECONDS
    for path in (studio.folder / "served").glob("*/image.*"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
    studio.disk.used = folder_bytes(studio.folder)
    return_freed_memory()
