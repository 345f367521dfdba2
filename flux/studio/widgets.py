"""Components that the tabs share: image inputs and outputs, downloads, status line; options of events."""

import html
from pathlib import Path
from typing import Any, Literal, TypedDict

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency
from gradio.utils import get_upload_folder
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.studio.progress import Update
from flux.studio.state import Studio

Changes = dict[Block, Any]
"""New values of components, as event functions return them."""


class Unlisted(TypedDict):
    """Options of an event that shows no progress and is no HTTP endpoint."""

    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


UNLISTED: Unlisted = {"show_progress": "hidden", "api_visibility": "private"}


class Unqueued(Unlisted):
    """Options of an event that is handled at once. An error in it is not shown."""

    queue: Literal[False]


class Concurrent(Unlisted):
    """Options of an event that does not wait for others. Only errors of queued events are shown."""

    concurrency_limit: None


UNQUEUED: Unqueued = {"queue": False, **UNLISTED}
CONCURRENT: Concurrent = {"concurrency_limit": None, **UNLISTED}


# ---- image inputs


def image_input(
    studio: Studio, first: Path | None = None, **options: Any
) -> tuple[gr.Image, gr.State, Dependency]:
    """Make an image upload.

    Args:
        studio: The studio.
        first: The image that stands there at first. If None, there is none.
        options: Arguments of `gr.Image`.

    Returns:
        The upload; a state that holds the path of what was uploaded: an upright image within the limits, as
        bare pixels, or None as long as there is no upload; and the event that fills the state.
    """
    value = first and str(first)
    upload = gr.Image(value, type="filepath", sources=["upload", "clipboard"], format="png", **options)
    held = gr.State(value)

    def keep(request: gr.Request, uploaded: dict[str, Any]) -> str:
        image = studio.limits.read_upload(uploaded, Path(get_upload_folder()))
        return str(studio.sessions.of(request.session_hash).keep_upload(image))

    # Not passed through gradio's preprocessing, which would open arbitrary uploads.
    kept = upload.upload(keep, upload, held, preprocess=False, concurrency_limit=None, **UNLISTED)
    kept.failure(lambda: (None, None), None, [upload, held], queue=False, **UNLISTED)
    upload.clear(lambda: None, None, held, queue=False, **UNLISTED)
    return upload, held, kept


def held_image(path: str) -> Image.Image:
    """Read the image that an `image_input` holds. Raise InputError if it has been deleted since."""
    if not Path(path).is_file():
        raise InputError("Your image is gone, a day after the session's last use: upload it again")
    return read_image(path)


# ---- outputs


def preview(elem_id: str) -> gr.Image:
    """Make the image that shows the steps of a run, in the place of a `flux.studio.viewer.viewer`."""
    return gr.Image(
        label="Preview",
        show_label=False,
        interactive=False,
        format="png",
        visible=False,
        elem_id=elem_id,
        elem_classes="stage",
        buttons=[],
    )


def results(
    label: str,
    elem_id: str,
    *,
    columns: int = 4,
    object_fit: Literal["contain", "cover"] = "cover",
    zoomable: bool = False,
    visible: bool = False,
    **more: Any,
) -> gr.Gallery:
    """Make a gallery of results.

    Args:
        label: What the images are, for screen readers.
        elem_id: The element's id.
        columns: Number of columns.
        object_fit: Whether an image is cut to fill its place, or shown whole.
        zoomable: Whether a click opens an image large.
        visible: Whether the gallery is shown while it is empty.
        more: Further arguments of `gr.Gallery`.
    """
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        fit_columns=False,
        allow_preview=False,
        interactive=False,
        height="auto",
        object_fit=object_fit,
        elem_id=elem_id,
        elem_classes=["results", "zoomable"] if zoomable else "results",
        buttons=[],
        visible=visible,
        **more,
    )


def download_button(label: str, path: Path | None = None) -> gr.DownloadButton:
    """Make a button that downloads a file, disabled until it has one."""
    return gr.DownloadButton(label, value=path, size="sm", interactive=path is not None)


def downloadable(path: Path | str) -> dict[str, Any]:
    """Give a `download_button` its file."""
    return gr.update(value=str(path), interactive=True)


def status_html(status: Update | str) -> str:
    """Render a run's update with a bar and the time left, or a plain text."""
    if isinstance(status, str):
        return f'<div class="run-status" role="status"><span>{html.escape(status)}</span></div>'
    share = status.done / status.total if status.total else 0
    texts = [status.text]
    if status.total:
        texts.append(f"{status.done} of {status.total}")
    if status.seconds_left is not None:
        texts.append(f"{duration(status.seconds_left)} left")
    return (
        f'<div class="run-status busy" role="status"><i style="width:{100 * share:.1f}%"></i>'
        f"<span>{html.escape(' · '.join(texts))}</span></div>"
    )


def duration(seconds: float) -> str:
    """Format a time: "40 s", "3 min" or "1.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
