"""Models that only Black Forest Labs runs: pictures through its HTTP interface. Nothing else can be asked of
them: their layers are not here to be bypassed, watched or injected into.
"""

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from io import BytesIO
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flux.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

BUSY = {429, 500, 503}  # answers that another attempt may change
ATTEMPTS, FIRST_WAIT = 5, 1.0  # seconds, doubled from one attempt to the next
POLL_EVERY, GIVE_UP_AFTER, ANSWER_WITHIN = 0.5, 600.0, 60.0  # seconds
NOT_YET_KNOWN = 5  # times a task may be unknown right after it was given
LARGEST = 2**26  # bytes of a picture


@dataclass(frozen=True)
class HostedModel:
    """What one of the models takes. Sides in pixels.

    Attributes:
        steps, guidance: their bounds; None: the model chooses for itself.
    """

    largest_side: int = 1440
    steps: tuple[int, int] | None = None
    guidance: tuple[float, float] | None = None
    shape_only: bool = False  # of width and height only their ratio counts


HOSTED = {
    "flux-pro": HostedModel(steps=(1, 50), guidance=(1.5, 5)),
    "flux-pro-1.1": HostedModel(),
    "flux-pro-1.1-ultra": HostedModel(shape_only=True),
    "flux-kontext-pro": HostedModel(shape_only=True),
    "flux-kontext-max": HostedModel(shape_only=True),
    "flux-2-pro": HostedModel(largest_side=2048),
    "flux-2-max": HostedModel(largest_side=2048),
    "flux-2-flex": HostedModel(largest_side=2048, steps=(1, 50), guidance=(1.5, 10)),
}
SMALLEST_SIDE, SIDE_STEP, LONGEST_SHAPE = 256, 32, 21 / 9
ENDINGS = {
    "Request Moderated": "the prompt was refused by moderation: word it otherwise",
    "Content Moderated": "the picture was withheld by moderation: take another prompt or seed",
    "Task not found": "the task is not known any more: try again",
    "Error": "the task failed there: try again",
}
REFUSALS = {
    401: "the key in BFL_API_KEY is not accepted: look it up at https://api.bfl.ai",
    402: "no credits are left: buy some at https://api.bfl.ai",
    403: "the key in BFL_API_KEY may not use this model: look it up at https://api.bfl.ai",
    404: "it is not known there: it may be retired",
}


def refusal(name: str) -> str:
    """Why a hosted model cannot do what is asked of a model here."""
    return (
        f"Got model {name!r}, which only Black Forest Labs runs: its layers are not here, so nothing can be "
        f"bypassed, injected, watched or edited in it. It makes pictures: python -m flux --name {name}"
    )


@dataclass(frozen=True)
class HostedSettings:
    """A request to a hosted model; None: as the model likes it.

    Raises:
        InputError: something that the model does not take.
    """

    model: str
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None

    def __post_init__(self):
        takes = HOSTED[self.model]
        bounds = {"num_steps": takes.steps, "guidance": takes.guidance}
        for name, value in ((name, getattr(self, name)) for name in bounds):
            if value is not None and bounds[name] is None:
                raise InputError(
                    f"Got {name} {value} for {self.model}, which chooses for itself: leave it out"
                )
            if value is not None and not bounds[name][0] <= value <= bounds[name][1]:
                low, high = bounds[name]
                raise InputError(f"Got {name} {value}, expected {low} to {high} for {self.model}")
        if (self.width is None) != (self.height is None):
            raise InputError(f"Got only one of width and height for {self.model}: give both or none")
        if self.width is None:
            return
        if takes.shape_only:
            if max(self.width / self.height, self.height / self.width) > LONGEST_SHAPE:
                raise InputError(f"Got {self.width}x{self.height}, expected no longer a shape than 21:9")
            return
        for name in ("width", "height"):
            side, largest = getattr(self, name), takes.largest_side
            if not SMALLEST_SIDE <= side <= largest or side % SIDE_STEP:
                bounds = f"a multiple of {SIDE_STEP} from {SMALLEST_SIDE} to {largest}"
                raise InputError(f"Got {name} {side}, expected {bounds} for {self.model}")

    def sampling(self) -> dict:
        """What was asked for beside prompt and seed, for the picture's metadata."""
        return {name: value for name, value in asdict(self).items() if name != "model" and value is not None}

    def request(self, prompt: str, seed: int) -> dict:
        """The body of the request."""
        body = {"prompt": prompt, "seed": seed, "output_format": "png"}
        if self.width is not None and HOSTED[self.model].shape_only:
            body["aspect_ratio"] = f"{self.width}:{self.height}"
        elif self.width is not None:
            body |= {"width": self.width, "height": self.height}
        named = {"steps": self.num_steps, "guidance": self.guidance}
        return body | {name: value for name, value in named.items() if value is not None}


def generate(settings: HostedSettings, prompt: str, seed: int) -> "Image":
    """A picture by a hosted model. The key is in BFL_API_KEY, BFL_API_ENDPOINT names another server.

    Raises:
        InputError: no key, no credits, a refusal, or no answer in time; the message says what to do.
    """
    base = os.environ.get("BFL_API_ENDPOINT", "https://api.bfl.ai").rstrip("/")
    task = _api(f"{base}/v1/{settings.model}", settings.request(prompt, seed))
    begin = time.monotonic()
    where, unknown = str(task.get("polling_url")), 0
    if urlsplit(where).netloc != urlsplit(base).netloc and not _is_bfl(where):
        raise InputError(f"Got a task at {where[:100]} from {base}: the key in BFL_API_KEY is not sent there")
    while True:
        answer = _api(where)
        status = answer.get("status")
        if status == "Ready":
            return _picture(str(answer.get("result", {}).get("sample")))
        unknown += status == "Task not found"
        if status in ENDINGS and (status != "Task not found" or unknown > NOT_YET_KNOWN):
            raise InputError(f"No picture by {settings.model}: {ENDINGS[status]}")
        if time.monotonic() - begin > GIVE_UP_AFTER:
            raise InputError(
                f"No picture by {settings.model} after {GIVE_UP_AFTER:.0f} seconds: try again later"
            )
        time.sleep(POLL_EVERY)


def _is_bfl(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".bfl.ai")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes nowhere but where it is meant to go."""

    def redirect_request(self, *_):
        return None


def _api(url: str, body: dict | None = None) -> dict:
    """The answer of the interface, an object, asked again while it is busy."""
    key = os.environ.get("BFL_API_KEY")
    if not key:
        raise InputError("Hosted models need a key: get one at https://api.bfl.ai and set BFL_API_KEY")
    headers = {"x-key": key, "Content-Type": "application/json", "Accept": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(_NoRedirect)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            with opener.open(urllib.request.Request(url, data, headers), timeout=ANSWER_WITHIN) as answer:
                return _object(answer.read(LARGEST), url)
        except urllib.error.HTTPError as error:
            if error.code == 404 and body is None:
                return {"status": "Task not found"}
            if error.code not in BUSY:
                raise InputError(f"Refused by {urlsplit(url).netloc}: {_reason(error)}") from error
            status = error.code
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"{urlsplit(url).netloc} cannot be reached ({reason}): try again later"
            ) from error
    busy = "too many tasks at once" if status == 429 else f"status {status}"
    raise InputError(f"{urlsplit(url).netloc} is busy ({busy}), {ATTEMPTS} times in a row: try again later")


def _object(text: bytes, url: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"Got no JSON object from {urlsplit(url).netloc}: is BFL_API_ENDPOINT right?")
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    if error.code in REFUSALS:
        return REFUSALS[error.code]
    try:
        detail = json.loads(error.read(LARGEST)).get("detail")
    except (ValueError, AttributeError, OSError):
        detail = None
    if isinstance(detail, list):
        detail = "; ".join(str(entry.get("msg")) for entry in detail if isinstance(entry, dict))
    told = " ".join(str(detail or error.reason).split())
    return f"status {error.code}, {told[:300]}"


def _picture(url: str) -> "Image":
    from PIL import Image

    try:
        if urlsplit(url).scheme not in ("https", "http"):
            raise ValueError(f"no address of a picture: {url[:100]!r}")
        with urllib.request.urlopen(url, timeout=ANSWER_WITHIN) as answer:
            return Image.open(BytesIO(answer.read(LARGEST))).convert("RGB")
    except (OSError, HTTPException, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"The picture was made but could not be fetched ({error}): try again") from error


class Hosted:
    """A hosted model behind the call that `flux.pipeline.Pipeline` has."""

    def __init__(self, name: str):
        self.name = name

    def generate(
        self, prompts: list[str], seeds: list[int], *, image: None = None, strength: float = 1.0, **sampling
    ) -> list["Image"]:
        """One picture for each prompt and seed, always from noise alone."""
        settings = HostedSettings(self.name, **sampling)
        return [generate(settings, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


SLUGS = {"flux-dev": "flux-1-dev", "flux-dev-krea": "flux-1-krea-dev"}


def track_usage_via_api(name: str, n: int = 1) -> None:
    """Reports n generations of the model `name` to BFL's interface, with the key in BFL_API_KEY.

    Raises:
        InputError: no key, or the report was refused.
    """
    if name not in SLUGS:
        print(f"{name} needs no usage report")
        return
    key = os.environ.get("BFL_API_KEY")
    if not key:
        raise InputError("Usage can only be reported with a key: set BFL_API_KEY")
    base = os.environ.get("BFL_API_ENDPOINT", "https://api.bfl.ai")
    request = urllib.request.Request(
        f"{base}/v1/licenses/models/{SLUGS[name]}/usage",
        data=json.dumps({"number_of_generations": n}).encode(),
        headers={"x-key": key, "Content-Type": "application/json"},
    )
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except (urllib.error.URLError, TimeoutError) as error:
        raise InputError(f"The usage report for {name} was not accepted: {error}") from error
