"""The studio as a whole: the model loaded, the page built and served."""

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image

from flux.errors import InputError
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import get_spec
from flux.studio.content_filter import DEFAULT, ContentFilter
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Visits, delete_unused
from flux.studio.state import Studio, T


def open_studio(
    settings: ModelSettings,
    folder: str | Path = "output/studio",
    content_filter: str = "auto",
    track_usage: bool = False,
) -> Studio:
    """Loads the model and the content filter.

    Args:
        content_filter: "auto" (upstream's classifier for FLUX.1 models, none for flux-nano), "off", or an
            image classifier by hub name or folder.

    Raises:
        InputError: as `Pipeline.load` and `ContentFilter.load`.
    """
    from flux.pipeline import Pipeline
    from flux.runtime.devices import pick_device

    settings = resolve(settings)
    spec = get_spec(settings.model)
    if content_filter == "auto":
        # The small model has seen no people.
        content_filter = "off" if spec.folder else DEFAULT
    device = pick_device(settings.device)

    def loaded() -> Engine:
        unsafe = None if content_filter == "off" else ContentFilter.load(content_filter, device)
        return Engine(settings, Pipeline.load(settings), unsafe)

    folder, engine = Path(folder).resolve(), _in_a_thread(loaded)
    return Studio(engine, Limits.of(spec), Visits(folder / "visits"), folder, track_usage)


def _in_a_thread(work: Callable[[], T]) -> T:
    """What the work returns, done in a thread that ends with it.

    OpenMP keeps threads for each one that has computed, for as long as that lives, and lets them wait for
    work less eagerly once there are more than cores: those of the main thread would slow down every run.
    """
    done = Future()

    def follow() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # Ctrl-C does not wait for it.
    threading.Thread(target=follow, daemon=True).start()
    return done.result()


def check_address(host: str | None, port: int | None, auth: str | None) -> None:
    """Raises InputError, before a model is loaded, where `serve` could not serve."""
    if auth is not None and not all(str(auth).partition(":")):
        raise InputError('Got auth without a colon or with an empty side: expected "user:password"')
    at = (str(host or "127.0.0.1").strip("[]"), port or 0)
    try:
        with socket.socket(socket.AF_INET6 if ":" in at[0] else socket.AF_INET) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(at)
    except (OSError, OverflowError, TypeError) as error:
        raise InputError(f"Cannot serve at {at[0]}:{port}: {error}; give another --host or --port") from error


def serve(
    studio: Studio,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    auth: str | None = None,
    **more: Any,
) -> Any:
    """Builds the page and serves it until Ctrl-C; further arguments are those of gradio's `launch`.

    Args:
        auth: "user:password", asked for before anything is shown.

    Raises:
        InputError: as `check_address`.
    """
    check_address(host, port, auth)
    # Read when components are made: uploads and copies of what is shown lie here, and are served from here.
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / "served")
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(studio.folder / "served" / "examples")
    delete_unused(studio.folder / "served")  # of a studio that was killed: gradio tidies up its own alone
    # Pillow refuses more than twice this many pixels, also where gradio opens what a browser sent.
    Image.MAX_IMAGE_PIXELS = studio.limits.upload_pixels

    from starlette.middleware import Middleware

    from flux.studio.hardening import OwnFilesOnly
    from flux.studio.page import LOOKS, build

    page = build(studio)
    # Without api_open, a request to the bare routes would pass by the queue.
    page.queue(max_size=studio.limits.waiting, api_open=False, default_concurrency_limit=8)
    try:
        return page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=tuple(auth.split(":", 1)) if auth else None,
            allowed_paths=[str(studio.visits.folder), str(studio.folder / "scans")],
            max_file_size=studio.limits.upload_bytes,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(OwnFilesOnly, folder=studio.folder)]},
            **{**LOOKS(), **more},
        )
    except OSError as error:
        raise InputError(f"Cannot serve at {host or '127.0.0.1'}:{port or '7860 and up'}: {error}") from error
