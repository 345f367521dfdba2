"""The studio behind a reverse proxy that serves it under a path, and by HTTPS."""

import subprocess
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest
from gradio_client import Client
from helpers.studio_page import SECONDS

from flux.errors import InputError
from flux.studio.address import check_tls
from flux.studio.app import Address, serve


class Proxy(BaseHTTPRequestHandler):
    """Passes /studio/... on to the studio, as nginx does with `proxy_pass`."""

    target = ""

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        headers |= {"Host": self.target, "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "http"}
        headers["X-Forwarded-Host"] = self.headers["Host"]
        there = HTTPConnection(self.target, timeout=60)
        there.request(self.command, self.path.removeprefix("/studio") or "/", body, headers)
        answer = there.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        while chunk := answer.read1():
            self.wfile.write(chunk)
            self.wfile.flush()
        there.close()

    do_GET = do_POST = do_HEAD = pass_on

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def proxied(served):
    address = Address("127.0.0.1", root_path="/studio", allowed_hosts=("studio.example.org",))
    app, url, _ = serve(served, address, prevent_thread_lock=True, quiet=True)
    Proxy.target = urlsplit(url).netloc
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/studio/"
        server.shutdown()
    app.get_blocks().close(verbose=False)


def test_programs_reach_it(proxied, served):
    client = Client(proxied, verbose=False)
    images, *_ = client.predict("a dog", num_steps=1, api_name="/generate")
    assert images
    assert served.callers.address(client.session_hash) == "203.0.113.9"
    own = {"host": "studio.example.org", "origin": "https://studio.example.org"}
    body = {"data": [], "fn_index": 0, "session_hash": "behind"}
    assert httpx.post(f"{proxied}gradio_api/queue/join", json=body, headers=own).status_code == 200
    other = {"host": "evil.example.org"}
    assert httpx.get(proxied, headers=other).status_code == 421


def test_the_page_works_behind_it(proxied, browser):
    page, faults = browser.new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(proxied)
    page.get_by_role("tab", name="Generate").click()
    page.locator("#generate-prompt textarea").fill("a dog")
    page.locator("#generate-go").click()
    page.locator("#generate-status").get_by_text("Done").wait_for()
    page.close()
    assert not faults


def test_https(served, tmp_path):
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 1 -subj /CN=localhost"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    files = {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}
    app, url, _ = serve(served, Address("127.0.0.1", **files), prevent_thread_lock=True, quiet=True)
    try:
        assert url.startswith("https://")
        assert httpx.get(url, verify=False).status_code == 200
    finally:
        app.get_blocks().close(verbose=False)


def test_certificates_that_are_none(tmp_path):
    (tmp_path / "no.pem").write_text("no")
    with pytest.raises(InputError, match="only one of"):
        check_tls(str(tmp_path / "no.pem"), None)
    for name in ("no.pem", "missing.pem"):
        with pytest.raises(InputError, match="no certificate and key"):
            check_tls(str(tmp_path / name), str(tmp_path / name))
