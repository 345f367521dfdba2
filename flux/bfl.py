"""Models that only Black Forest Labs (BFL) runs: images through its HTTP interface.

Their layers are not here, so they cannot be skipped, watched or injected into. The environment variable
BFL_API_KEY holds the key, BFL_API_ENDPOINT may name another server.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flux.errors import InputError
from flux.specs import HOSTED

if TYPE_CHECKING:
    from PIL.Image import Image

BUSY = {429, 500, 503}  # status codes that another attempt may change
ATTEMPTS, FIRST_WAIT = 5, 1.0  # seconds, doubled from one attempt to the next
POLL_EVERY, GIVE_UP_AFTER, ANSWER_WITHIN = 0.5, 600.0, 60.0  # seconds
NOT_YET_KNOWN = 5  # times that a new task may be unknown
MAX_IMAGE_BYTES = 2**26  # bytes of an answer
SMALLEST_SIDE, SIDE_STEP, LONGEST_SHAPE = 256, 32, 21 / 9

ENDINGS = {
    "Request Moderated": "the prompt was refused by moderation: word it otherwise",
    "Content Moderated": "the image was withheld by moderation: use another prompt or seed",
    "Task not found": "the task is not known any more: try again",
    "Error": "the task failed there: try again",
}
REFUSALS = {
    401: "the key in BFL_API_KEY is not accepted: look it up at https://api.bfl.ai",
    402: "no credits are left: buy some at https://api.bfl.ai",
    403: "the key in BFL_API_KEY may not use this model: look it up at https://api.bfl.ai",
    404: "it is not known there: it may be retired",
}
USAGE_NAMES = {
    "flux-dev": "flux-1-dev",
    "flux-dev-krea": "flux-1-krea-dev",
    "flux-dev-kontext": "flux-1-kontext-dev",
    **{
        f"flux-dev-{tool}": "flux-tools"
        for tool in ("fill", "canny", "depth", "canny-lora", "depth-lora", "redux")
    },
}


@dataclass(frozen=True)
class HostedSettings:
    """A request to a hosted model. Where a field is None, the model chooses.

    Raises:
        InputError: The model does not take one of the values.
    """

    model: str
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None

    def __post_init__(self):
        takes = HOSTED[self.model]
        for name, value, bounds in (
            ("num_steps", self.num_steps, takes.steps),
            ("guidance", self.guidance, takes.guidance),
        ):
            if value is None:
                continue
            if bounds is None:
                raise InputError(
                    f"Got {name} {value} for {self.model}, which chooses for itself: leave it out"
                )
            low, high = bounds
            if not low <= value <= high:
                raise InputError(f"Got {name} {value}, expected {low} to {high} for {self.model}")
        if self.width is None and self.height is None:
            return
        if self.width is None or self.height is None:
            raise InputError(f"Got only one of width and height for {self.model}: give both or none")
        if takes.shape_only:
            if max(self.width / self.height, self.height / self.width) > LONGEST_SHAPE:
                raise InputError(f"Got {self.width}x{self.height}, expected no longer a shape than 21:9")
            return
        for name, side in (("width", self.width), ("height", self.height)):
            if not SMALLEST_SIDE <= side <= takes.largest_side or side % SIDE_STEP:
                bounds = f"a multiple of {SIDE_STEP} from {SMALLEST_SIDE} to {takes.largest_side}"
                raise InputError(f"Got {name} {side}, expected {bounds} for {self.model}")

    def sampling(self) -> dict[str, Any]:
        """Return the given fields except the model's name, for the image's metadata."""
        return {name: value for name, value in asdict(self).items() if name != "model" and value is not None}

    def request(self, prompt: str, seed: int) -> dict[str, Any]:
        """Return the body of the request."""
        body = {"prompt": prompt, "seed": seed, "output_format": "png"}
        if self.width is not None and HOSTED[self.model].shape_only:
            body["aspect_ratio"] = f"{self.width}:{self.height}"
        elif self.width is not None:
            body |= {"width": self.width, "height": self.height}
        named = {"steps": self.num_steps, "guidance": self.guidance}
        return body | {name: value for name, value in named.items() if value is not None}


def generate(settings: HostedSettings, prompt: str, seed: int) -> "Image":
    """Return one image by a hosted model.

    Raises:
        InputError: There is no key or no credit, the request was refused, or no answer came in time. The
            message says what to do.
    """
    task = _ask_for_object(f"{_server()}/v1/{settings.model}", settings.request(prompt, seed))
    task_url = str(task.get("polling_url"))
    if urlsplit(task_url).netloc != urlsplit(_server()).netloc and not _is_bfl(task_url):
        raise InputError(
            f"Got a task at {task_url[:100]} from {_server()}: the key in BFL_API_KEY is not sent there"
        )
    begin, unknown = time.monotonic(), 0
    while True:
        answer = _ask_for_object(task_url)
        status = answer.get("status")
        if status == "Ready":
            return _fetch(str(answer.get("result", {}).get("sample")))
        unknown += status == "Task not found"
        if status in ENDINGS and (status != "Task not found" or unknown > NOT_YET_KNOWN):
            raise InputError(f"No image by {settings.model}: {ENDINGS[status]}")
        if time.monotonic() - begin > GIVE_UP_AFTER:
            raise InputError(
                f"No image by {settings.model} after {GIVE_UP_AFTER:.0f} seconds: try again later"
            )
        time.sleep(POLL_EVERY)


def track_usage_via_api(name: str, n: int = 1) -> None:
    """Report `n` generations of the model `name` to BFL, as its commercial licences require.

    Raises:
        InputError: There is no key, or the report was refused.
    """
    if name not in USAGE_NAMES:
        print(f"{name} needs no usage report")
        return
    _ask(f"{_server()}/v1/licenses/models/{USAGE_NAMES[name]}/usage", {"number_of_generations": n})


# ---- HTTP


def _server() -> str:
    return os.environ.get("BFL_API_ENDPOINT", "https://api.bfl.ai").rstrip("/")


def _is_bfl(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".bfl.ai")


def _ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    """Return the interface's answer; ask again while it is busy.

    Raises:
        InputError: There is no key, the request was refused, or the interface cannot be reached.
    """
    key, host, status = os.environ.get("BFL_API_KEY", "").strip(), urlsplit(url).netloc, 0
    if not (key and key.isascii() and key.isprintable()):
        raise InputError("BFL's interface needs a key: get one at https://api.bfl.ai and set BFL_API_KEY")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            status, meaning, content = _send(url, body, key)
        except OSError as error:
            raise InputError(f"{host} cannot be reached ({error}): try again later") from error
        if 200 <= status < 300:
            return content
        if status == 404 and body is None:
            return b'{"status": "Task not found"}'
        if status not in BUSY:
            raise InputError(
                f"Refused by {host}: {REFUSALS.get(status) or _reason(status, meaning, content)}"
            )
    busy = "too many tasks at once" if status == 429 else f"status {status}"
    raise InputError(f"{host} is busy ({busy}), {ATTEMPTS} times in a row: try again later")


def _ask_for_object(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = _parsed(_ask(url, body))
    if not isinstance(answer, dict):
        raise InputError(f"Got no JSON object from {urlsplit(url).netloc}: is BFL_API_ENDPOINT right?")
    return answer


def _fetch(url: str) -> "Image":
    """Return the finished image at an address that needs no key."""
    from PIL import Image

    try:
        status, meaning, content = _send(url)
        if status != 200:
            raise OSError(f"status {status}, {meaning}")
        return Image.open(BytesIO(content)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"The image was made but could not be fetched ({error}): try again") from error


def _send(url: str, body: dict[str, Any] | None = None, key: str | None = None) -> tuple[int, str, bytes]:
    """Send a request, a POST if it has a body; return the status code, its meaning and the content.

    Redirects are followed only without a key, so that the key goes nowhere else.

    Raises:
        OSError: The server cannot be reached, or sends more than `MAX_IMAGE_BYTES` bytes.
    """
    import httpx

    how = {"headers": {"x-key": key} if key else {}, "follow_redirects": not key, "timeout": ANSWER_WITHIN}
    content = b""
    try:
        with httpx.stream("GET" if body is None else "POST", url, json=body, **how) as answer:
            for piece in answer.iter_bytes():
                content += piece
                if len(content) > MAX_IMAGE_BYTES:
                    raise OSError(f"more than {MAX_IMAGE_BYTES} bytes")
            return answer.status_code, answer.reason_phrase, content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(str(error) or type(error).__name__) from error


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _reason(status: int, meaning: str, content: bytes) -> str:
    answer = _parsed(content)
    detail = answer.get("detail") if isinstance(answer, dict) else None
    if isinstance(detail, list):
        detail = "; ".join(str(entry.get("msg")) for entry in detail if isinstance(entry, dict))
    text = " ".join(str(detail or meaning).split())
    return f"status {status}, {text[:300]}"
