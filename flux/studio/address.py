"""Where and how the studio is served."""

import os
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from flux.errors import InputError
from flux.studio.guard import Front


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
        """Raise InputError as `check_address` and `check_tls`. Called before a model is loaded."""
        check_address(self.host, self.port, self.auth)
        check_tls(self.ssl_certfile, self.ssl_keyfile)

    @property
    def is_public(self) -> bool:
        """Whether others than this machine's user may open the page."""
        is_own = self.host in (None, "localhost", "127.0.0.1", "::1", "[::1]") and not self.allowed_hosts
        return not is_own or self.share or self.root_path is not None or "SPACE_HOST" in os.environ

    def front(self) -> Front:
        """Return the names that the studio is reached under."""
        names = [self.host, urlsplit(self.root_path or "").hostname, os.environ.get("SPACE_HOST")]
        hosts = [*self.allowed_hosts, *filter(None, names), *[".gradio.live"] * self.share]
        frames = ["https://huggingface.co"] if "SPACE_HOST" in os.environ else []
        return Front(tuple(host.strip("[]").lower() for host in hosts), tuple(frames), self.share)


def check_address(host: str | None, port: int | None, auth: str | None) -> None:
    """Check, before a model is loaded, that `serve` can serve.

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
        place = address[0] if port is None else f"{address[0]}:{port}"
        raise InputError(f"Cannot serve at {place}: {error}; give another --host or --port") from error


def check_tls(certfile: str | None, keyfile: str | None) -> None:
    """Raise InputError unless there are both a certificate and its key, or neither."""
    if (certfile is None) != (keyfile is None):
        raise InputError("Got only one of ssl_certfile and ssl_keyfile: give both, or neither")
    if certfile and keyfile:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile)
        except OSError as error:
            raise InputError(
                f"Got {certfile} and {keyfile}, which are no certificate and key: {error}"
            ) from error
