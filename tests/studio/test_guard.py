"""Requests as they reach the server: names, origins, sizes, logins, callers; what answers disclose."""

import errno
import json
import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.waiting import until

from flux.studio.app import Address, serve
from flux.studio.guard import Front, Logins

ELSEWHERE = "http://evil.example.com"
API = "gradio_api"


def join(url, **body):
    return httpx.post(f"{url}{API}/queue/join", json={"data": [], "fn_index": 0, **body}, timeout=60)


# ---- names and origins


def test_only_own_names_are_answered(url):
    """Else a site could let its own name lead here, and read what it likes (DNS rebinding)."""
    assert httpx.get(url).status_code == 200
    for headers in ({"host": "evil.example.com"}, {"x-forwarded-host": "evil.example.com"}):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 421
        assert "allowed_hosts" in answer.text


def test_names():
    front = Front(("studio.example.org", ".gradio.live"))
    for name in (
        "localhost:7860",
        "127.0.0.1",
        "[::1]:7860",
        "10.0.0.7",
        "Studio.Example.org",
        "a.gradio.live",
    ):
        assert front.allows(name), name
    for name in (
        "",
        "[::1",
        "example.org",
        "xstudio.example.org",
        "gradio.live",
        "127.0.0.1.example.com",
        "a@b@c",
    ):
        assert not front.allows(name), name


def test_pages_of_other_sites_can_neither_ask_nor_read(url):
    elsewhere = {"origin": ELSEWHERE}
    for method, path in (("POST", f"{API}/queue/join"), ("POST", f"{API}/upload"), ("OPTIONS", "")):
        assert httpx.request(method, f"{url}{path}", headers=elsewhere).status_code == 403
    answer = httpx.get(f"{url}config", headers=elsewhere)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    own = {"origin": url.rstrip("/")}
    assert join_status(url, own) == 200


def join_status(url, headers) -> int:
    body = {"data": [], "fn_index": 0, "session_hash": "own"}
    return httpx.post(f"{url}{API}/queue/join", json=body, headers=headers).status_code


def test_another_server_cannot_be_named_as_this_one(url):
    answer = httpx.get(f"{url}config", headers={"x-gradio-server": ELSEWHERE})
    assert "evil" not in answer.text


def test_headers_bind_the_browser(url, served):
    answer = httpx.get(url)
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'self'", "frame-ancestors 'self'", "object-src 'none'", "connect-src 'self'"):
        assert rule in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    files = {"files": ("a.html", b"<script>alert(1)</script>")}
    [path] = httpx.post(f"{url}{API}/upload", files=files).json()
    assert "sandbox" in httpx.get(f"{url}{API}/file={path}").headers["content-security-policy"]


# ---- what the server says of itself


def test_no_answer_names_the_servers_folder(url, client, served, photo_file):
    folder = str(served.folder).encode()
    [path] = httpx.post(f"{url}{API}/upload", files={"files": ("a.png", photo_file.read_bytes())}).json()
    assert path.startswith("/studio-files/")
    assert httpx.get(f"{url}{API}/file={path}").content == photo_file.read_bytes()
    data = ["a dog", 0, 1, 64, 64, 1, 3, 1, "", {"path": path, "meta": {"_type": "gradio.FileData"}}, 0.8]
    event = httpx.post(f"{url}{API}/call/generate", json={"data": data}).json()["event_id"]
    answer = httpx.get(f"{url}{API}/call/generate/{event}", timeout=60)
    assert "event: complete" in answer.text
    for content in (httpx.get(url).content, httpx.get(f"{url}config").content, answer.content):
        assert folder not in content
    secret = httpx.get(f"{url}{API}/file=/studio-files/../secret.txt")
    assert secret.status_code == 403


# ---- bodies


def test_bodies_are_bounded(url, served):
    assert httpx.post(f"{url}{API}/queue/join", content=b" " * 2**21).status_code == 413

    def endless():
        for _ in range(2**11):
            yield b" " * 2**10

    assert httpx.post(f"{url}{API}/queue/join", content=endless()).status_code == 413


def test_an_upload_that_is_broken_off_leaves_nothing(url, served):
    before = set((served.folder / "served").rglob("*"))
    place = urlsplit(url)
    head = (
        f"POST /{API}/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head.encode() + b"0" * 300_000)
        time.sleep(0.5)
    time.sleep(0.5)
    assert set((served.folder / "served").rglob("*")) == before


def test_slow_uploads_are_counted(url):
    place = urlsplit(url)
    head = (
        f"POST /{API}/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 1000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(socket.create_connection((place.hostname, place.port)))
            connection.sendall(head.encode())
        time.sleep(0.5)
        files = {"files": ("a.txt", b"text")}
        assert httpx.post(f"{url}{API}/upload", files=files).status_code == 429
        assert httpx.get(url).status_code == 200
    time.sleep(0.5)
    assert httpx.post(f"{url}{API}/upload", files=files).status_code == 200


def test_a_full_disk_refuses_uploads_and_runs(url, client, served, photo_file, monkeypatch):
    monkeypatch.setattr(served.disk, "most", 10)
    answer = httpx.post(f"{url}{API}/upload", files={"files": ("a.png", photo_file.read_bytes())})
    assert answer.status_code == 507
    with pytest.raises(Exception, match="disk quota"):
        client.predict("a dog", num_steps=1, api_name="/generate")


def test_a_disk_that_cannot_be_written_to(client, served, monkeypatch, capfd):
    """One line for the visitor, without the server's folders; and the studio goes on."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flux.files.os.replace", refuse)
        with pytest.raises(Exception, match="no space left") as caught:
            client.predict("a dog", num_steps=1, api_name="/generate")
    assert str(served.folder) not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert client.predict("a dog", num_steps=1, api_name="/generate")


def test_a_file_named_many_times_is_refused(url, photo_file):
    """Each naming costs its pixels in memory, however small the file is."""
    [path] = httpx.post(f"{url}{API}/upload", files={"files": ("a.png", photo_file.read_bytes())}).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    config = httpx.get(f"{url}config").json()
    event = next(each for each in config["dependencies"] if each["api_name"] == "dropped")
    join(url, data=[[file] * 20], fn_index=event["id"], session_hash="files")
    answer = httpx.get(f"{url}{API}/queue/data", params={"session_hash": "files"}, timeout=60)
    assert "20 files" in answer.text


# ---- who asks


def test_made_up_names_push_nobody_out(url, served, client):
    """Neither their images nor their turn in the line; beyond some, an address gets no more."""
    client.predict("a dog", num_steps=1, api_name="/generate")
    session = served.sessions.of(client.session_hash)
    assert session.images()
    config, statuses = httpx.get(f"{url}config").json(), []
    event = next(each["id"] for each in config["dependencies"] if each["api_name"] == "cancel")
    for number in range(300):
        served.sessions.of(f"made-up-{number}")  # as an event of the page would
    for number in range(220):
        served.callers.admit(f"made-up-{number}", "127.0.0.1")
    with httpx.Client() as http:
        for number in range(220, 260):
            body = {"data": [], "fn_index": event, "session_hash": f"made-up-{number}"}
            statuses.append(http.post(f"{url}{API}/run/cancel", json=body).status_code)
    assert (statuses[0], statuses[-1]) == (200, 429)
    assert served.sessions.of(client.session_hash) is session
    assert session.images()
    served.callers.forget_idle(0)


def test_wrong_passwords_are_slowed_down(served):
    address = Address("127.0.0.1", auth="me:secret")
    app, url, _ = serve(served, address, prevent_thread_lock=True, quiet=True)
    try:
        wrong = {"username": "me", "password": "no"}
        statuses = [httpx.post(f"{url}login", data=wrong).status_code for _ in range(8)]
        assert statuses[:5] == [400] * 5
        assert 429 in statuses
        right = httpx.post(f"{url}login", data={**wrong, "password": "secret"})
        assert right.status_code == 429
        assert int(right.headers["retry-after"]) <= 8
    finally:
        app.get_blocks().close(verbose=False)


def test_the_wait_doubles_and_ends(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("flux.studio.guard.time.monotonic", lambda: now[0])
    logins, waits = Logins(), []
    for _ in range(9):
        logins.note("a", False)
        waits.append(logins.wait("a"))
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16]
    assert logins.wait("b") == 0
    now[0] += 17
    assert logins.wait("a") == 0
    logins.note("a", True)
    logins.note("a", False)
    assert logins.wait("a") == 0


def test_a_program_that_leaves_stops_its_run(url, served, monkeypatch):
    monkeypatch.setattr("flux.studio.callers.GONE_SECONDS", 0.5)
    data = {"data": ["a dog", 0, 4, 512, 256, 100, 3, 1, "", None, 0.8]}
    event = httpx.post(f"{url}{API}/call/generate", json=data).json()["event_id"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{url}{API}/call/generate/{event}", timeout=1.0)
    until(lambda: not served.line.has(event, "endpoint"))
    assert not served.engine.running


def test_programs_that_never_listen_do_not_fill_the_line(url, client, served, monkeypatch):
    data = {"data": ["a dog", 0, 4, 256, 256, 100, 3, 1, "", None, 0.8]}
    events = [httpx.post(f"{url}{API}/call/generate", json=data).json()["event_id"] for _ in range(40)]
    until(lambda: sum(served.line.has(event, "endpoint") for event in events) >= 32)
    assert sum(served.line.has(event, "endpoint") for event in events) == 32
    for event in events:
        served.line.stop(event, "endpoint")
    # The others begin now, and end when they have not been listened to for so long.
    monkeypatch.setattr("flux.studio.callers.UNHEARD_SECONDS", 1.0)
    assert client.predict("a dog", num_steps=1, api_name="/generate")


def test_json_that_is_none_is_no_caller(url):
    assert httpx.post(f"{url}{API}/queue/join", content=json.dumps([1]).encode()).status_code == 422
