"""A hub on this machine that does all that real ones do: drops, refuses, stalls, lies."""

import hashlib
import http.server
import json
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import save

from flux.specs import configs
from flux.weights.hub import TEXT_FOLDERS, own_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = configs["flux-dev"]
FLOW = save({"a": torch.arange(20_000.0)})
FILES = {"flux1-dev.safetensors": FLOW, "ae.safetensors": FLOW[:-8] + bytes(8)}
FILES |= {"tokenizer/vocab.json": b"{}", "tokenizer/merges.txt": b"#", "tokenizer_2/spiece.model": b"s"}
for folder in TEXT_FOLDERS:
    FILES[f"{folder}/{'config.json' if 'encoder' in folder else 'tokenizer_config.json'}"] = (
        b"{}" + folder.encode()
    )
    if "encoder" in folder:
        FILES[f"{folder}/model.safetensors"] = FLOW + folder.encode()


class Hub(http.server.ThreadingHTTPServer):
    """Its behaviour is what the test makes of these.

    Attributes:
        asked: method, path and range of every request.
        refusals: answers to give before anything else: status, or (status, headers); the last one stays with
            `stubborn`.
        drop_at: break each transfer off after so many bytes, None: not.
        damaged: how many transfers arrive with a wrong byte.
        down_after: answer nothing but 500 after so many transfers, None: not.
    """

    def reset(self):
        self.asked, self.refusals, self.stubborn, self.drop_at, self.damaged = [], [], False, None, 0
        self.down_after = None

    @property
    def transfers(self) -> list[str | None]:
        """The range asked for in each transfer of a large file."""
        return [
            span for method, path, span in self.asked if method == "GET" and path.endswith(".safetensors")
        ]


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self, body=True):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((self.command, path, self.headers.get("Range")))
        if server.refusals and (body or server.stubborn):
            refusal = (
                server.refusals[0]
                if server.stubborn and len(server.refusals) == 1
                else server.refusals.pop(0)
            )
            status, headers = refusal if isinstance(refusal, tuple) else (refusal, {})
            return self.answer(status, b"{}", headers, body)
        if server.down_after is not None and len(server.transfers) > server.down_after:
            return self.answer(500, b"{}", {}, body)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(x), **hashes(name, x)} for name, x in FILES.items()]
            about = {"id": SPEC.repo_id, "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(about).encode(), {}, body)
        if name not in FILES:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        content, start = FILES[name], 0
        about = hashes(name, content)
        tag = about["lfs"]["sha256"] if "lfs" in about else about["blobId"]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        if body and name.endswith(".safetensors"):
            if server.damaged:
                server.damaged -= 1
                content = content[:-1] + b"?"
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, content[start:], headers, body, server.drop_at)
        return None

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, status, content, headers, body, drop_at=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:drop_at])
            self.close_connection = drop_at is not None

    def log_message(self, *_):
        pass


def hashes(name: str, content: bytes) -> dict:
    """The hub's facts about a file: its hash and, for weights, the hash of their content."""
    own = {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if name.endswith(".safetensors"):
        own["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return own


def lie_at(endpoint: str, monkeypatch) -> None:
    """Sets the endpoint as HF_ENDPOINT does before the hub's client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def own_flow(spec=SPEC, download=True) -> Path:
    """The transformer's file of a model, from this hub or its cache."""
    return own_file(spec, spec.repo_flow, download)


def partials() -> list[Path]:
    """The files in the cache that are not complete."""
    return list(Path(constants.HF_HUB_CACHE).rglob("*.part"))


def snapshots() -> list[Path]:
    """The complete files in the cache."""
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if path.is_file()]
