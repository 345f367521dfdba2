"""What gradio does for other pages and not for this one: fetching from elsewhere, serving other files."""

import re
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like
from starlette.responses import PlainTextResponse

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


def fetch_nothing(page: gr.Blocks) -> None:
    """Where a browser sends an address in place of an upload, no part of the page fetches what lies there."""
    for block in page.blocks.values():
        if hasattr(block, "async_move_resource_to_block_cache"):
            block.async_move_resource_to_block_cache = _uploads_only(block.async_move_resource_to_block_cache)


def _uploads_only(keep: Any) -> Any:
    async def keep_upload(path: str | Path | None) -> str | None:
        if is_http_url_like(str(path)):
            raise gr.Error("Got the address of a file: upload the file itself", print_exception=False)
        return await keep(path)

    return keep_upload
