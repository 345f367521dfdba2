"""The studio as a whole: loads its models, builds the page and serves it."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from flux.content_filters import DEFAULT, ContentFilter
from flux.errors import InputError
from flux.loaded_model import LoadedModel
from flux.runtime.devices import pick_device, return_freed_memory
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.settings.resolved import ResolvedModel
from flux.specs import get_spec
from flux.studio.address import Address
from flux.studio.engine import Engine
from flux.studio.guard import Guard
from flux.studio.limits import Limits
from flux.studio.line import Line
from flux.studio.memory import Memory
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
    others: Sequence[ModelSettings] = (),
) -> Studio:
    """Load the first model and the content filter.

    Args:
        settings: The first model, and its page's defaults.
        folder: Where the studio writes.
        content_filter: "auto" (upstream's classifier for FLUX.1 models, none for flux-nano), "off", or an
            image classifier by hub name or folder.
        track_usage: Whether to report each image to Black Forest Labs.
        publish_scans: Whether the layers that a visitor's scan finds become the default of everybody.
        others: Further models, see `flux.studio.models`. Each is loaded when a run needs it.

    Raises:
        InputError: The settings are beyond the studio's `Limits`; or as `LoadedModel.load` and
            `ContentFilter.load`.
    """
    first, *rest = (resolve(each) for each in (settings, *others))
    limits = Limits.of(get_spec(first.model))
    limits.check_size(first)
    filters, model = _in_a_thread(lambda: (_filters([first, *rest], content_filter), LoadedModel.load(first)))
    memory, folder = Memory(), Path(folder).resolve()
    studio = Studio(
        engine=Engine(first, model, filters[first.model], memory),
        limits=limits,
        sessions=Sessions(folder / "visits"),
        folder=folder,
        track_usage=track_usage,
        publish_scans=publish_scans,
        line=Line(limits.waiting, limits.waiting_each),
        disk=Disk(limits.disk_bytes),
    )
    for other in rest:
        studio.add(Engine(other, None, filters[other.model], memory))
    return studio


def _filters(models: Sequence[ResolvedModel], chosen: str) -> dict[str, ContentFilter | None]:
    """Load the content filter of each model, by the model's name."""
    names = {each.model: chosen for each in models}
    if chosen == "auto":  # small models have seen no people
        names = {each.model: "off" if get_spec(each.model).folder else DEFAULT for each in models}
    device = pick_device(models[0].device)
    loaded = {
        name: ContentFilter.load(name, device) for name in dict.fromkeys(names.values()) if name != "off"
    }
    return {model: loaded.get(name) for model, name in names.items()}


def _in_a_thread(work: Callable[[], T]) -> T:
    """Do the work in a thread that ends with it, and return the result.

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


def serve(studio: Studio, address: Address | None = None, **more: Any) -> tuple["FastAPI", str, str | None]:
    """Build the page and serve it until Ctrl-C.

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
    _prepare_gradio(studio)

    from flux.studio.page import build, theme

    page = build(studio)
    # Runs wait in the studio's own line. Without api_open=False, requests to bare routes would bypass it.
    page.queue(max_size=studio.limits.waiting, api_open=False, default_concurrency_limit=8)
    is_blocking = not more.pop("prevent_thread_lock", False)
    options = {**theme(), **_address_options(address), **_studio_options(studio, address), **more}
    try:
        launched = page.launch(prevent_thread_lock=True, **options)
    except OSError as error:
        place = f"{address.host or '127.0.0.1'}:{address.port or '7860 and up'}"
        raise InputError(f"Cannot serve at {place}: {error}") from error
    if is_blocking:
        _serve_until_interrupted(studio, page)
    return launched


def _prepare_gradio(studio: Studio) -> None:
    """Tell gradio and Pillow where to write and what to refuse. Before the page's components are made."""
    served = studio.folder / "served"
    # Uploads, and copies of what is shown, are written and served here.
    os.environ["GRADIO_TEMP_DIR"] = str(served)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(served / "examples")
    # gradio deletes its own files only, not those of a studio that was killed.
    delete_unused(served)
    # Pillow refuses more than twice this many pixels, also where gradio opens what a browser sent.
    Image.MAX_IMAGE_PIXELS = studio.limits.upload_pixels


def _address_options(address: Address) -> dict[str, Any]:
    """Make the arguments of gradio's `launch` that say where the page is served."""
    user, _, password = (address.auth or "").partition(":")
    return {
        "server_name": address.host,
        "server_port": address.port,
        "share": address.share,
        "auth": (user, password) if address.auth else None,
        "ssl_certfile": address.ssl_certfile,
        "ssl_keyfile": address.ssl_keyfile,
        "ssl_verify": False,  # gradio asks itself whether it has started, by another name
        "root_path": address.root_path,
    }


def _studio_options(studio: Studio, address: Address) -> dict[str, Any]:
    """Make the arguments of gradio's `launch` that bound what visitors can reach and send."""
    from starlette.middleware import Middleware

    from flux.studio.hardening import OwnFilesOnly

    file_bytes = max(each.limits.file_bytes for each in studio.models.values())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        # Around gradio's own middleware, which would answer other sites' pages.
        guarded = app.middleware_stack
        app.middleware_stack = Guard(guarded, address.front(), studio.callers, file_bytes, studio.disk)
        keeping = asyncio.create_task(_keep_house(studio, app))
        yield
        keeping.cancel()

    return {
        "allowed_paths": [str(studio.sessions.folder), str(studio.folder / "scans")],
        "max_file_size": file_bytes,
        "max_threads": studio.limits.waiting + 40,  # each waiting run has a thread
        "footer_links": ["api"],
        "run_history": False,
        "enable_monitoring": False,
        "app_kwargs": {
            "middleware": [Middleware(OwnFilesOnly, folder=studio.folder)],
            "lifespan": lifespan,
        },
    }


def _serve_until_interrupted(studio: Studio, page: "Page") -> None:
    """Wait for Ctrl-C, then end the running work within a step.

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
    """Delete what nobody needs any more, once a minute."""
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
    """Delete unused files of visits and scans, and previews; count the rest; give memory back."""
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
