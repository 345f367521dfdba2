"""Errors of downloads from the hub: which are worth another attempt, and one line for each of the others."""

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from flux.errors import InputError, reason_of

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
ATTEMPTS = 6  # without progress
FIRST_PAUSE = 1.0  # seconds, doubled from one attempt to the next
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
NO_ADDRESS = ("UnsupportedProtocol", "InvalidURL")  # errors of httpx
NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def with_retries(
    action: Callable[[], T], progress: Callable[[], int] = lambda: 0, connect_attempts: int = ATTEMPTS
) -> T:
    """Call `action`, again with growing pauses as long as another attempt may help, and return its result.

    Args:
        action: The request.
        progress: Returns a number that grows when `action` gets further. Then attempts are counted anew.
        connect_attempts: The number of attempts without a connection after which to give up.
    """
    failures = 0
    while True:
        before = progress()
        try:
            return action()
        except Exception as error:
            failures = 0 if progress() > before else failures + 1
            name = type(error).__name__
            attempts = connect_attempts if name.startswith("Connect") else ATTEMPTS
            if failures == attempts or not _is_temporary(error):
                raise
            pause = FIRST_PAUSE * 2 ** min(failures, 5)
            print(f"The hub does not answer ({name}): trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)


def _is_temporary(error: Exception) -> bool:
    """Whether it is an error of the network that may be over soon."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRY_STATUS
    # The client's version decides which of httpx's errors it passes on.
    kind = type(error)
    from_network = kind.__module__.startswith("httpx") and kind.__name__ not in NO_ADDRESS
    return from_network or "Consistency check failed" in str(error)


@contextmanager
def hub_errors(repo_id: str, licence: str, what: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line that says what to do.

    Args:
        repo_id: The repository, "owner/name".
        licence: Its licence.
        what: The wanted files, for the message.

    Raises:
        InputError: The block raised an error of the hub, the network, or the disk.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _reason(error, repo_id, licence)
        if reason is None:
            raise
        raise InputError(f"Could not get {what} of {repo_id} from the hub: {reason}") from error


def _reason(error: Exception, repo_id: str, licence: str) -> str | None:
    """The reason of a failed download, and what to do; None for errors that are not the hub's."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    refusal = _refusal(error, repo_id, licence) if isinstance(error, HfHubHTTPError) else None
    if refusal:
        return refusal
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "it is not on this machine, and the hub cannot be reached or HF_HUB_OFFLINE is set: "
            "go online, or give the files' paths"
        )
    if isinstance(error, OSError) and error.errno in NO_FOLDER:
        return f"{error.filename} cannot be written: set HF_HOME to a folder that can"
    if type(error).__name__ in NO_ADDRESS:
        return f"HF_ENDPOINT is {constants.ENDPOINT!r}: begin it with https://, or unset it"
    if isinstance(error, UnicodeEncodeError):  # headers are ASCII
        return "the token has a letter that tokens never have: log in with `hf auth login`, or mend HF_TOKEN"
    if type(error).__name__ == "ProxyError" or (
        isinstance(error, ValueError | ImportError) and "proxy" in f"{error}".lower()
    ):
        return (
            f"the proxy refuses ({_one_line(str(error), 120)}): mend or unset HTTPS_PROXY, HTTP_PROXY and "
            "ALL_PROXY, or give the files' paths"
        )
    if _is_temporary(error):
        return (
            f"it cannot be reached or breaks off ({type(error).__name__}): try again, it goes on where "
            "it stopped; or set HF_ENDPOINT to a mirror, or give the files' paths"
        )
    return reason_of(error) if isinstance(error, OSError) else None


def _refusal(error: "HfHubHTTPError", repo_id: str, licence: str) -> str | None:
    """The reason of an answer with an error's status; None if the status and its words say none."""
    from huggingface_hub import constants, errors

    page, status, said = f"{constants.ENDPOINT}/{repo_id}", error.response.status_code, _words_of_hub(error)
    if isinstance(error, errors.DisabledRepoError) or "disabled" in said:
        return f"the hub has disabled it{said}: give the files' paths"
    if "fine-grained" in said:
        return (
            f"the token may not read it{said}: allow it public gated repositories at "
            f"{constants.ENDPOINT}/settings/tokens, or set HF_TOKEN to another one"
        )
    if re.search("invalid.*(credentials|token|username)", said, re.IGNORECASE):
        return f"the token is not valid{said}: log in again with `hf auth login`, or set HF_TOKEN anew"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return (
            f"access to it has to be asked for: accept its licence ({licence}) at {page}, "
            f"then log in with `hf auth login` or set HF_TOKEN{said}"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"there is no {page}, or it is not shown without a token: `hf auth login`, or HF_TOKEN"
    if status in RETRY_STATUS:
        return f"it answers with status {status}: try again later; what has come so far is kept"
    return None


def _words_of_hub(error: "HfHubHTTPError") -> str:
    """The hub's own words on a refusal, in brackets; empty if it says nothing."""
    words = error.response.headers.get("X-Error-Message")
    return f' (it says: "{_one_line(words, 200)}")' if words else ""


def _one_line(text: str, length: int) -> str:
    """A foreign text in one printable line of at most so many characters."""
    line = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return line if len(line) <= length else f"{line[:length]} ..."
