"""The studio as a whole: loads the model, builds the page and serves it."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from flux.errors import InputError
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import get_spec
from flux.studio.content_filter import DEFAULT, ContentFilter
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Sessions, delete_unused
from flux.studio.state import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI

T = TypeVar("T")


def open_studio(
    settings: ModelSettings,
    folder: str | Path = "output/studio",
    content_filter: str = "auto",
    track_usage: bool = False,
) -> Studio:
    """Loads the model and the content filter.

    Args:
        settings: The model, and the page's defaults.
        folder: Where the studio writes.
        content_filter: "auto" (upstream's classifier for FLUX.1 models, none for flux-nano), "off", or an
            image classifier by hub name or folder.
        track_usage: Whether to report each image to Black Forest Labs.

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
    return Studio(engine, Limits.of(spec), Sessions(folder / "visits"), folder, track_usage)


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


def serve(
    studio: Studio,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    auth: str | None = None,
    **more: Any,
) -> tuple["FastAPI", str, str | None]:
    """Builds the page and serves it until Ctrl-C.

    Args:
        studio: The studio.
        host: The address to serve at. If None, this machine alone is served.
        port: The port to serve at. If None, a free one from 7860 on.
        share: Whether to open a public link through gradio's servers.
        auth: "user:password", asked for before anything is shown.
        more: Further arguments of gradio's `launch`.

    Returns:
        As gradio's `launch`: the app, its local address and its public one.

    Raises:
        InputError: As `check_address`.
    """
    check_address(host, port, auth)
    # Read when components are made: uploads, and copies of what is shown, are written and served here.
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / "served")
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(studio.folder / "served" / "examples")
    # gradio deletes its own files only, not those of a studio that was killed.
    delete_unused(studio.folder / "served")
    # Pillow refuses more than twice this many pixels, also where gradio opens what a browser sent.
    Image.MAX_IMAGE_PIXELS = studio.limits.upload_pixels

    from starlette.middleware import Middleware

    from flux.studio.hardening import OwnFilesOnly
    from flux.studio.page import build, theme

    page = build(studio)
    # Without api_open=False, a request to the bare routes would bypass the queue.
    page.queue(max_size=studio.limits.waiting, api_open=False, default_concurrency_limit=8)
    user, _, password = (auth or "").partition(":")
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=(user, password) if auth else None,
            allowed_paths=[str(studio.sessions.folder), str(studio.folder / "scans")],
            max_file_size=studio.limits.upload_bytes,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(OwnFilesOnly, folder=studio.folder)]},
            **{**theme(), **more},
        )
    except OSError as error:
        raise InputError(f"Cannot serve at {host or '127.0.0.1'}:{port or '7860 and up'}: {error}") from error
