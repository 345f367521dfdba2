"""Restrictions on gradio: no file of another host or folder, none of ours named, errors of one line."""

import html
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.block_function import BlockFunction
from gradio.components.api_component import Api
from gradio.state_holder import SessionState
from gradio.utils import get_upload_folder
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import flux
from flux.errors import InputError

ALIAS = "/studio-files"
"""The name under which visitors see the folder that the studio writes to."""
TEXTS = ("text/html", "text/plain", "text/event-stream", "application/json")
FILE = re.compile(r"/file[=/](.*)$", re.DOTALL)
UNUSED = re.compile(
    r"/gradio_api/(proxy=|deep_link|process_recording|stream/|runs|run-history|dev/|profiling)|vibe-|/monitoring"
)
FIELD_FILES = 3
"""The most files of one field. gradio opens each, also if one file is named many times."""
TRAINING_IMAGES = 12
FIELD_FILES_OF = {"lora-images": TRAINING_IMAGES}
"""The most files of fields that take more, by their elements' ids. Their events do without that opening."""
_FOLDERS = {
    Path(os.path.expanduser("~")),
    Path.cwd(),
    Path(tempfile.gettempdir()),
    Path(sys.prefix),
    Path(flux.__file__).parent,
}
OWN_FILES = re.compile(
    "|".join(rf"{re.escape(str(folder))}/[^\s'\"()<>:,;]*" for folder in _FOLDERS if folder != Path("/"))
)
"""Paths of this machine, as messages have them."""


class OwnFilesOnly:
    """Middleware that serves files of one folder only, and none of gradio's routes that this page lacks.

    It refuses routes that fetch from other hosts. In answers the folder is called ALIAS, so that they do not
    say where it is. All other requests pass.
    """

    def __init__(self, app: ASGIApp, folder: Path):
        self.app, self.folder = app, folder.resolve()
        text = str(self.folder)
        # gradio writes JSON with and without escapes.
        self._names = list(dict.fromkeys([text.encode(), json.dumps(text)[1:-1].encode()]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["path"] = FILE.sub(lambda found: f"/file={real_path(found[1], self.folder)}", scope["path"])
        if self.allowed(scope["path"]):
            await self.app(scope, receive, self._renaming(send))
        else:
            await PlainTextResponse("Not served here", 403)(scope, receive, send)

    def _renaming(self, send: Send) -> Send:
        is_text = False

        async def sending(message: Message) -> None:
            nonlocal is_text
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_text = headers.get("content-type", "").startswith(TEXTS)
                is_file = "content-disposition" in headers
                if is_text := is_text and not is_file:
                    del headers["content-length"]
            elif is_text and (body := message.get("body")):
                for name in self._names:
                    body = body.replace(name, ALIAS.encode())
                message = {**message, "body": body}
            await send(message)

        return sending

    def allowed(self, path: str) -> bool:
        """Tell whether a request may be answered, by its decoded path."""
        if not (requested := FILE.search(path)):
            return not UNUSED.search(path)
        file = Path(requested[1])
        try:
            return file.is_absolute() and file.resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # too long, or with a zero byte
            return False


def real_path(path: str, folder: Path) -> str:
    """Return the path of a file that a visitor calls by ALIAS. Other paths stay."""
    return f"{folder}{path[len(ALIAS) :]}" if path.startswith(f"{ALIAS}/") else path


def with_real_paths(data: Any) -> Any:
    """Return what a page sent, with the real path of each of its files."""
    folder = Path(get_upload_folder()).resolve().parent

    def find(file: dict[str, Any]) -> dict[str, Any]:
        return {**file, "path": real_path(file["path"], folder)}

    return traverse(data, find, is_file_obj)


class Page(gr.Blocks):
    """A page that shows every error as one readable line, and that fetches no file."""

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Process a call as gradio does, with readable errors."""
        if (event := kwargs.get("event_data")) is not None:
            event._data = with_real_paths(event._data)  # of the image that was clicked
        with readable_errors():
            return await super().process_api(*args, **kwargs)

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        """Check the values of a call, then prepare them as gradio does.

        Raises:
            InputError: A value that no field of the page sends.
        """
        # A program may leave out an endpoint's last fields.
        left_out = [field.value for field in block_fn.inputs[len(inputs) :] if isinstance(field, Api)]
        inputs = [*with_real_paths(inputs), *left_out]
        _check_values(block_fn.inputs, inputs)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error as error:
            raise InputError(error.message) from None
        except Exception as error:
            raise InputError(
                "Got a value that no field of the page sends, or a file that was not uploaded"
            ) from error


def _check_values(fields: Sequence[Any], values: Sequence[Any]) -> None:
    """Raise InputError for values that gradio mishandles.

    These are an address instead of an upload, which gradio would fetch; more files than a field has, each of
    which it would hold in memory; text that it cannot send back; and numbers that a field cannot have.
    """
    files: list[str] = []

    def note(file: dict[str, Any]) -> None:
        if is_http_url_like(file["path"]):
            raise InputError("Got the address of a file: upload the file itself")
        files.append(file["path"])

    for field, value in zip(fields, values):
        files.clear()
        traverse(value, note, is_file_obj)
        if len(files) > (most := FIELD_FILES_OF.get(field.elem_id, FIELD_FILES)):
            raise InputError(f"Got {len(files)} files in one field, expected at most {most}")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("Got text that is not valid Unicode: type it again") from None
    for field, value in zip(fields, values):
        if isinstance(field, gr.Slider) or (isinstance(field, gr.Number) and value is not None):
            _check_number(field, value)


def _check_number(field: gr.Slider | gr.Number, value: Any) -> None:
    """Raise InputError for a number that is missing, outside its slider, or too large to be sent back."""
    least, most, wanted = -(10.0**18), 10.0**18, "a number of at most 18 digits"
    if isinstance(field, gr.Slider):
        least, most = field.minimum, field.maximum
        wanted = f"a number from {least:g} to {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InputError(f"{field.label}: expected {wanted}, got {value!r:.60}")


def without_folders(message: str) -> str:
    """Remove the folders of this machine from a message: its files keep their bare names."""
    return OWN_FILES.sub(lambda found: Path(found[0]).name, message)


def toast(kind: Callable[[str], None], message: str) -> None:
    """Show a message, which may quote a file, with `gr.Info` or `gr.Warning`, which read it as HTML."""
    kind(html.escape(without_folders(message), quote=False))


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn every error into one line in the visitor's browser; also prints unexpected errors here."""
    try:
        yield
    except gr.Error:
        raise
    except InputError as error:
        message = str(error)
    except FileNotFoundError:
        message = "A file is gone: what a visit made is deleted a day after its last use; make it again"
    except OSError as error:
        # The folder is read-only, or the disk is full.
        print(f"error: the studio cannot write: {error}", file=sys.stderr)
        message = f"The studio cannot write to its disk ({error.strerror or 'an error'})"
    except torch.OutOfMemoryError:
        message = "This needs more memory than there is: choose a smaller size, or fewer layers"
    except Exception:
        traceback.print_exc(file=sys.stderr)
        message = "Something went wrong in the studio; the terminal of the server says what"
    else:
        return
    # The page shows messages as HTML, and they quote what the visitor typed.
    message = html.escape(without_folders(message), quote=False)
    raise gr.Error(message, print_exception=False)
