"""The outermost layer of the server: what a request must be like before gradio sees it.

It checks the names that the server is asked under (DNS rebinding), where a request comes from, how large it
is and how often an address has tried to log in, and sends the headers that bind the browser to this server.
"""

import asyncio
import ipaddress
import json
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from tempfile import SpooledTemporaryFile
from typing import IO
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flux.studio.callers import Callers
from flux.studio.sessions import Disk

Refusal = tuple[int, str, dict[str, str]]
"""Status, message and headers of an answer that is no page."""
FORM_BYTES = 2**20  # of a request that uploads no file
BODY_SECONDS = 300.0  # until a request's body has arrived
MOST_UPLOADS = 16  # of an address at once
CHUNK = 2**16
FREE_LOGINS = 5  # wrong passwords of an address before it has to wait
LONGEST_WAIT = 300.0

# Gradio's page starts with scripts in its HTML and compiles the templates of gr.HTML.
SCRIPTS = "'self' 'unsafe-inline' 'unsafe-eval'"
POLICY = (
    "default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'{more}; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:{more}; "
    "connect-src 'self' data: blob:{more}; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'{frames}"
)
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""For uploaded and written files: shown alone, none of them may run anything."""
GRADIO_CDN = " https://gradio.s3-us-west-2.amazonaws.com"
"""From where the page of a public link (`--share`) loads its scripts."""


@dataclass(frozen=True)
class Front:
    """The names that the studio is reached under, and the pages that may show it inside them.

    Attributes:
        hosts: Names without port. One that begins with a dot allows all names that end with it. Addresses
            in numbers and this machine's own names are always allowed.
        frames: Addresses of pages that may show the studio in a frame.
        is_shared: Whether there is a public link through gradio's servers.
    """

    hosts: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    is_shared: bool = False

    def allows(self, host: str) -> bool:
        """Tell whether a Host header names this studio."""
        name = _hostname(f"//{host}").rstrip(".")
        try:
            ipaddress.ip_address(name)
            return True  # nobody's domain leads here
        except ValueError:
            return name in _own_names() or any(
                name.endswith(known) if known.startswith(".") else name == known for known in self.hosts
            )

    def policy(self) -> str:
        """Return the Content-Security-Policy of the page."""
        more = GRADIO_CDN if self.is_shared else ""
        frames = "".join(f" {page}" for page in self.frames)
        return POLICY.format(scripts=SCRIPTS + more, more=more, frames=frames)


@cache
def _own_names() -> frozenset[str]:
    """Name of this machine. Asking for them may take a while."""
    return frozenset({"localhost", socket.gethostname().lower(), socket.getfqdn().lower()})


class Logins:
    """Wrong passwords by address: after FREE_LOGINS of them, each doubles the time to wait."""

    def __init__(self):
        self._wrong: dict[str, tuple[int, float]] = {}

    def wait(self, address: str) -> float:
        """Return the seconds until the address may try again."""
        wrong, last = self._wrong.get(address, (0, 0.0))
        if wrong < FREE_LOGINS:
            return 0.0
        return max(0.0, last + min(LONGEST_WAIT, 2.0 ** (wrong - FREE_LOGINS)) - time.monotonic())

    def note(self, address: str, was_right: bool) -> None:
        """Note the outcome of a login."""
        wrong, _ = self._wrong.pop(address, (0, 0.0))
        if not was_right:
            self._wrong[address] = (wrong + 1, time.monotonic())
        if len(self._wrong) > 10_000:
            del self._wrong[next(iter(self._wrong))]


@dataclass(eq=False)
class Guard:
    """Middleware around everything else, see the module.

    Attributes:
        app: The whole app of gradio, with its own middleware.
        front: The names that the studio is reached under.
        callers: Who is connected.
        upload_bytes: Largest uploaded file, in bytes.
        disk: How much has been written.
        logins: Wrong passwords.
        uploading: The uploads that are just arriving, by address.
    """

    app: ASGIApp
    front: Front
    callers: Callers
    upload_bytes: int
    disk: Disk
    logins: Logins = field(default_factory=Logins)
    uploading: Counter[str] = field(default_factory=Counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._with_headers(scope, send)
        refusal = self._refusal(scope) or await self._pass_on(scope, receive, send)
        if refusal:
            status, message, more = refusal
            await PlainTextResponse(message, status, more)(scope, receive, send)

    # ---- before the body

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        names = [headers.get("host", ""), *_listed(headers.get("x-forwarded-host"))]
        for name in names:
            if not self.front.allows(name):
                return (
                    421,
                    f"This studio does not know the host {name[:100]!r}: its operator can allow it "
                    "(--allowed_hosts)",
                    {},
                )
        origin = headers.get("origin")
        # Behind a proxy the Host may be the proxy's own name for this server, not the page's.
        own = {f"{scheme}://{name.lower()}" for name in names for scheme in ("http", "https")}
        is_own = origin is None or origin.lower() in own or _hostname(origin) in self.front.hosts
        if not is_own and scope["method"] not in ("GET", "HEAD"):
            return 403, "Refused: the request comes from another site's page", {}
        # Without an origin, gradio sends no header that lets another site's page read the answer.
        # x-gradio-server would name another server as this one.
        dropped = {b"x-gradio-server"} | (set() if is_own else {b"origin"})
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in dropped]
        if _is_login(scope) and (wait := self.logins.wait(_address(scope))):
            seconds = str(math.ceil(wait))
            return 429, f"Too many wrong passwords: wait {seconds} s", {"retry-after": seconds}
        return None

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        is_file = "/file=" in scope["path"]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = FILE_POLICY if is_file else self.front.policy()
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "same-origin"
                if _is_login(scope) and scope["method"] == "POST" and message["status"] != 429:
                    self.logins.note(_address(scope), message["status"] < 400)
            await send(message)

        return sending

    # ---- the body, and who sends it

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> Refusal | None:
        """Read the whole body, then pass the request on. So gradio sees no upload that is broken off."""
        name, address = _listener(scope), _address(scope)
        with SpooledTemporaryFile(max_size=FORM_BYTES) as body:
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                is_upload = Headers(scope=scope).get("content-type", "").startswith("multipart/")
                refusal = await self._take(receive, body, self._uploads(address) if is_upload else None)
                if refusal:
                    return refusal
                name = None if is_upload else _session_of(body)
                receive = _replayed(body, receive)
            if name and not self.callers.admit(name, address, is_event=_is_event(scope)):
                return 429, "Too many visits from this address at once: try again in some minutes", {}
            listening = self.callers.listening(name) if name and scope["method"] == "GET" else nullcontext()
            try:
                with listening:
                    await self.app(scope, receive, send)
            except OSError as error:  # the app has answered "500"
                self._full(error)
        return None

    async def _take(
        self, receive: Receive, body: IO[bytes], uploads: AbstractContextManager[bool] | None
    ) -> Refusal | None:
        """Read a request's body into a file. `uploads` counts it among its address's, if it is an upload."""
        most = self.upload_bytes + FORM_BYTES if uploads else FORM_BYTES
        try:
            with uploads or nullcontext(True) as is_admitted:
                if not is_admitted:
                    return 429, "Too many uploads at once: wait until some are done", {}
                size = await asyncio.wait_for(_read(receive, body, most), BODY_SECONDS)
        except (asyncio.TimeoutError, ConnectionError):
            return 408, "The request did not arrive", {}
        except OSError as error:
            return self._full(error)
        if size is None:
            return 413, f"Got more than {most // 2**20} MB: send less", {}
        if uploads:
            if not self.disk.has_room(size):
                return 507, "The studio's disk quota is used up: try again tomorrow", {}
            self.disk.used += size
        return None

    @contextmanager
    def _uploads(self, address: str) -> Iterator[bool]:
        """Count an upload that is arriving. Gives False if its address has too many."""
        self.uploading[address] += 1
        try:
            yield self.uploading[address] <= MOST_UPLOADS
        finally:
            self.uploading[address] -= 1
            if not self.uploading[address]:
                del self.uploading[address]

    def _full(self, error: OSError) -> Refusal:
        print(f"error: the studio cannot write: {error.strerror or error}", file=sys.stderr)
        return 507, "The studio cannot write to its disk", {}


async def _read(receive: Receive, body: IO[bytes], most: int) -> int | None:
    """Read a request's body into a file, and return its size, or None if it has more bytes than `most`.

    Raises:
        ConnectionError: The client left before the end.
    """
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > most:
            return None
        body.write(chunk)
    body.seek(0)
    return size


def _replayed(body: IO[bytes], receive: Receive) -> Receive:
    """Give the app the body that was read; then what else the client says."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        chunk = body.read(CHUNK)
        is_read = len(chunk) < CHUNK
        return {"type": "http.request", "body": chunk, "more_body": not is_read}

    return replay


def _session_of(body: IO[bytes]) -> str | None:
    """Find the session hash in a JSON body."""
    try:
        data = json.load(body)
    except (ValueError, RecursionError):
        data = None
    body.seek(0)
    name = data.get("session_hash") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def _listener(scope: Scope) -> str | None:
    """Name the caller that a stream belongs to, or None if the request is no stream."""
    path = scope["path"].rstrip("/").split("/")
    if path[-2:] == ["queue", "data"]:
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    # gradio names a program without a session hash by its event.
    return path[-1] if _is_event(scope) or path[-2:-1] == ["heartbeat"] else None


def _is_event(scope: Scope) -> bool:
    """Tell whether a request listens to one event, whose name no later one has."""
    return scope["method"] == "GET" and "/call/" in scope["path"]


def _hostname(address: str) -> str:
    """Return the name or number of the host in an address, "" if there is none."""
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:  # such as half an IPv6 address
        return ""


def _listed(header: str | None) -> Sequence[str]:
    return [name.strip() for name in header.split(",")] if header else ()


def _is_login(scope: Scope) -> bool:
    return scope["path"].rstrip("/").endswith("/login")


def _address(scope: Scope) -> str:
    """The client's address. A proxy on this machine names it, and uvicorn puts it there."""
    return scope["client"][0] if scope.get("client") else ""
