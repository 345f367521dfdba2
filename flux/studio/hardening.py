"""Restrictions on gradio: no file of another host or folder, and every error as one readable line."""

import html
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.block_function import BlockFunction
from gradio.state_holder import SessionState
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flux.errors import InputError

FILE = re.compile(r"/file[=/](.*)$", re.DOTALL)
UNUSED = re.compile(r"/gradio_api/(proxy=|deep_link|process_recording|stream/|runs|run-history)|/monitoring")


class OwnFilesOnly:
    """Middleware that serves files of one folder only, and none of gradio's routes that this page lacks.

    It refuses routes that fetch from other hosts. All other requests pass.
    """

    def __init__(self, app: ASGIApp, folder: Path):
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request, or passes it on."""
        if scope["type"] == "http" and not self.allowed(scope["path"]):
            await PlainTextResponse("Not served here", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def allowed(self, path: str) -> bool:
        """Tells whether a request may be answered, by its decoded path."""
        if not (requested := FILE.search(path)):
            return not UNUSED.search(path)
        file = Path(requested[1])
        try:
            return file.is_absolute() and file.resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # too long, or with a zero byte
            return False


class Page(gr.Blocks):
    """A page that shows every error as one readable line, and that fetches no file."""

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Processes a call as gradio does, with readable errors."""
        with readable_errors():
            return await super().process_api(*args, **kwargs)

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        """Checks the values of a call, then prepares them as gradio does.

        Raises:
            InputError: A value that no field of the page sends.
        """
        _check_values(block_fn.inputs, inputs)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error:
            raise
        except Exception as error:
            raise InputError(
                "Got a value that no field of the page sends, or a file that was not uploaded"
            ) from error


def _check_values(fields: Sequence[Any], values: Sequence[Any]) -> None:
    """Raises InputError for values that gradio mishandles.

    These are an address instead of an upload, which gradio would fetch; text that it cannot send back; and a
    missing number, as of a slider that was cleared.
    """

    def refuse(file: dict[str, Any]) -> None:
        if is_http_url_like(file["path"]):
            raise InputError("Got the address of a file: upload the file itself")

    traverse(values, refuse, is_file_obj)
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("Got text that is not valid Unicode: type it again") from None
    for field, value in zip(fields, values):
        required = isinstance(field, gr.Slider) or (isinstance(field, gr.Number) and value is not None)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
        if required and not number:
            raise InputError(f"{field.label}: expected a number, got {value!r:.60}")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turns every error into one line in the visitor's browser; also prints unexpected errors here."""
    try:
        yield
    except gr.Error:
        raise
    except InputError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "This needs more memory than there is: choose a smaller size, or fewer layers"
    except Exception:
        traceback.print_exc(file=sys.stderr)
        message = "Something went wrong in the studio; the terminal of the server says what"
    else:
        return
    # The page shows messages as HTML, and they quote what the visitor typed.
    raise gr.Error(html.escape(message, quote=False), print_exception=False)
