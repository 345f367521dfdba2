"""Reports how many pictures a licensed model made, for those whose licence from Black Forest Labs asks for
it.
"""

import json
import os
import urllib.error
import urllib.request

from flux.errors import InputError

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
