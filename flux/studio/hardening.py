"""What gradio does for other pages and not for this one: fetching from elsewhere, serving other files, errors
without a word.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction
from gradio_client.utils import is_file_obj, is_http_url_like, traverse
from starlette.responses import PlainTextResponse

from flux.errors import InputError
from flux.studio.limits import readable

FILE = re.compile(r"/file[=/](.*)$", re.DOTALL)
UNUSED = re.compile(r"/gradio_api/(proxy=|deep_link|process_recording|stream/|runs|run-history)|/monitoring")


class OwnFilesOnly:
    """In front of the server: files only from `folder`, and none of the routes that fetch, or that no page
    here uses. Everything else passes.
    """

    def __init__(self, app: Any, folder: Path):
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.allowed(scope["path"]):
            answer = PlainTextResponse("Not served here", 403)
            return await answer(scope, receive, send)
        return await self.app(scope, receive, send)

    def allowed(self, path: str) -> bool:
        """Whether the path of a request, already decoded, may be answered."""
        if not (asked := FILE.search(path)):
            return not UNUSED.search(path)
        try:
            return Path(asked[1]).is_absolute() and Path(asked[1]).resolve().is_relative_to(self.folder)
        except (OSError, ValueError):  # too long, or with a zero byte
            return False


class Page(gr.Blocks):
    """A page on which every error ends as one readable line, and for which no file is fetched."""

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with readable():
            return await super().process_api(*args, **kwargs)

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        _check_sent(block_fn.inputs, inputs)
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise InputError(
                "Got what no field of the page sends, or a file that was not uploaded"
            ) from error


def _check_sent(fields: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Raises InputError for what gradio has no words for: an address in place of an upload, which it would
    fetch, letters that it cannot send back, and no number where one is due, as in a slider that was cleared.
    """

    def refuse(file: dict[str, Any]) -> None:
        if is_http_url_like(file["path"]):
            raise InputError("Got the address of a file: upload the file itself")

    traverse(inputs, refuse, is_file_obj)
    try:
        json.dumps(inputs, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("Got letters that UTF-8 cannot hold") from None
    for field, value in zip(fields, inputs):
        if isinstance(field, gr.Slider) or (isinstance(field, gr.Number) and value is not None):
            if type(value) not in (int, float) or not abs(value) < 2**63:
                raise InputError(f"{field.label}: expected a number, got {value!r:.60}")
