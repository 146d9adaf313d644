# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server's log: one access line per request, in logfmt, which no client can forge."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests

from tests.support.harness import Server, running, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    exchange,
    form,
    get,
    logfmt,
    logged,
    new_folder,
    part,
    post,
    put,
    request,
)


def ask(server: Server, method: str, path: str, **headers: str) -> requests.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.request(method, f"{server.url}/{path}", headers=fields, timeout=SECONDS)


# Access lines


def test_the_fields_of_a_download(server: Server):
    key = f"{new_folder()}/a b.log"
    put(server, key, b"content")
    before = time.time()
    answer = ask(server, "GET", key, User_Agent="a client/1.0")
    line = access(server, answer)
    assert list(line) == [
        "ts", "event", "ip", "status", "bytes", "method", "path", "ua", "cache", "duration", "request_id"
    ]  # fmt: skip
    moment = datetime.fromisoformat(line.pop("ts"))
    assert moment.utcoffset() is not None and before - 1 < moment.timestamp() < time.time() + 1
    assert 0 < float(line.pop("duration")) < SECONDS
    assert line == {
        "event": "access",
        "ip": "127.0.0.1",
        "status": "200",
        "bytes": "7",
        "method": "GET",
        "path": "/" + key.replace(" ", "%20"),
        "ua": "a client/1.0",
        "cache": "hit",
        "request_id": answer.headers["X-Request-ID"],
    }


def requests_of_all_kinds(server: Server, folder: str) -> Iterator[tuple[requests.Response, dict[str, str]]]:
    """Responses, and the expected fields of their lines."""
    user, key = {"user": "user@example.com"}, f"{folder}/a"
    by_user = server.headers()
    yield put(server, key, b"content"), {"status": "201", "method": "PUT", "path": f"/{key}", **user}
    yield put(server, key, b"content"), {"status": "200", "method": "PUT", "path": f"/{key}", **user}
    yield (
        post(server, part("path", folder.encode()), part("file0", b"x", "b")),
        {"status": "200", "method": "POST", "path": "/upload", **user},
    )
    yield get(server, key), {"status": "200", "bytes": "7", "cache": "hit"}
    yield get(server, key, {"Range": "bytes=0-2"}), {"status": "206", "bytes": "3", "cache": "hit"}
    yield get(server, key, {"If-None-Match": "*"}), {"status": "304", "bytes": "0", "cache": "hit"}
    yield get(server, key, {"Range": "bytes=9-"}), {"status": "416", "cache": "hit"}
    yield ask(server, "HEAD", key), {"status": "200", "bytes": "0", "method": "HEAD", "cache": "hit"}
    yield get(server, f"{folder}/none"), {"status": "404", "error": "not_found: no such file"}
    yield get(server, "v1/nothing"), {"status": "404"}
    yield ask(server, "POST", key), {"status": "405", "method": "POST"}
    yield ask(server, "OPTIONS", key), {"status": "200", "method": "OPTIONS"}
    yield ask(server, "PUT", key), {"status": "401", "error": "unauthorized: no Authorization header"}
    yield ask(server, "GET", "v1/checkauth", **by_user), {"status": "200", **user}
    yield ask(server, "DELETE", key, **by_user), {"status": "204", "bytes": "0", "method": "DELETE", **user}
    yield ask(server, "GET", ""), {"status": "200", "path": "/"}
    yield ask(server, "GET", "metrics"), {"status": "200", "path": "/metrics"}
    yield ask(server, "GET", f"v1/list?prefix={folder}"), {"status": "200", "path": "/v1/list"}


def test_every_request_has_one_line(server: Server):
    answers = []
    for answer, expected in requests_of_all_kinds(server, new_folder()):
        line = access(server, answer)
        assert expected.items() <= line.items()
        assert ("user" in line) != ("ua" in line)
        if answer.request.method != "HEAD":
            assert line["bytes"] == str(len(answer.content))
        answers.append(answer)
    for answer in answers:
        assert len(logged(server, answer.headers["X-Request-ID"], "access")) == 1


def test_the_line_is_written_when_the_last_byte_was_sent(server: Server):
    key, content = f"{new_folder()}/a", bytes(24 << 20)
    put(server, key, content)
    with Wire(server, receive_buffer=64 * 1024) as wire:
        wire.send(request("GET", f"/{key}"))
        answer = wire.head()
        access(server, get(server, key, {"Range": "bytes=0-0"}))  # another request's line does not wait
        assert logged(server, answer.headers["X-Request-ID"], "access") == []
        assert len(wire.read(len(content))) == len(content)
        line = access(server, answer)
    assert line["bytes"] == str(len(content))


def test_uploads_and_deletions_are_logged(server: Server):
    folder = new_folder()
    stored = post(server, part("path", folder.encode()), part("file0", b"one", "a"), part("file1", b"two2", "b c"))
    lines = logged(server, stored.headers["X-Request-ID"], "stored")
    assert [(line["key"], line["size"], line["user"]) for line in lines] == [
        (f"{folder}/a", "3", "user@example.com"),
        (f"{folder}/b c", "4", "user@example.com"),
    ]
    assert [line["sha256"] for line in lines] == [file["sha256"] for file in stored.json()["files"]]
    deleted = ask(server, "DELETE", f"{folder}/a", **server.headers())
    (line,) = logged(server, deleted.headers["X-Request-ID"], "deleted")
    assert (line["key"], line["user"]) == (f"{folder}/a", "user@example.com")


# Hostile clients


HOSTILE_AGENTS = [
    b'"',
    b'a" status=200 user="root',
    b"a status=200 event=access",
    b"back\\slash\\",
    b'trailing backslash \\"',
    b"=",
    b"tab\tand  blanks",
    b"caf\xe9 \xff\x85\xa0\x9b",
    b"\xe2\x80\xa8line separator",
    b"%0d%0aevent=access",
    b"\\nevent=access",
    b"x" * 8000,
    b"\x80" * 8000,
    b"",
]
HOSTILE_TARGETS = [
    b'/"',
    b"/a=b",
    b'/"%20status=200',
    b"/%0d%0aevent=access",
    b"/%22%5c",
    b"/\\",
    b"/a\\nb",
    b"/'",
    b"/%e2%80%a8",
    b"/%ff",
    b"/" + b"%0a" * 4000,
    b"/" + b"x" * 12_000,
    b"/#a",
    b"/;a",
]


@pytest.mark.parametrize("agent", HOSTILE_AGENTS, ids=lambda agent: repr(agent[:40]))
def test_a_hostile_user_agent_cannot_break_a_line(local_server: Server, agent: bytes):
    before = len(local_server.log())
    with Wire(local_server) as wire:
        wire.send(b"GET /none HTTP/1.1\r\nHost: x\r\nUser-Agent: " + agent + b"\r\n\r\n")
        line = access(local_server, wire.answer())
    assert_shown(line["ua"], agent.decode("latin-1").strip())
    assert (line["status"], line["event"], "user" in line) == ("404", "access", False)
    assert_whole_lines(local_server, before)


@pytest.mark.parametrize("target", HOSTILE_TARGETS, ids=lambda target: repr(target[:40]))
def test_a_hostile_path_cannot_break_a_line(local_server: Server, target: bytes):
    before = len(local_server.log())
    line = access(local_server, exchange(local_server, request("GET", target)))
    assert_shown(line["path"], target.decode())
    assert (line["status"], line["method"]) in (("404", "GET"), ("200", "GET"))
    assert_whole_lines(local_server, before)


def assert_shown(field: str, text: str) -> None:
    """Check that a field has this text; of a long one, the beginning and a mark that it was cut."""
    if len(text) <= 2048 and field == text:
        return
    kept = field.removesuffix("[cut]")
    assert kept != field and text.startswith(kept)
    assert len(kept.encode()) > 600  # the less, the more the line has of characters that are written as six


def assert_whole_lines(server: Server, before: int) -> None:
    """Check that each later line is logfmt, and short enough for an atomic write to a pipe."""
    for line in server.log()[before:].split("\n")[:-1]:
        assert line.startswith("ts=") and logfmt(line)["event"], line
        assert len(line.encode()) < select.PIPE_BUF


def test_a_hostile_key_in_an_upload_cannot_break_a_line(server: Server):
    folder = new_folder()
    name = 'a" event=access b=\u2028\xa0'
    response = post(server, part("path", folder.encode()), part("file0", b"x", name.replace('"', "%22")))
    (line,) = logged(server, response.headers["X-Request-ID"], "stored")
    assert line["key"] == f"{folder}/{name}"
    refused = post(server, part("path", b'x\n"event=access'), part("file0", b"x", "a"))
    assert access(server, refused)["status"] == "400"


def test_a_hostile_email_cannot_break_a_line(local_server: Server):
    email = 'a b" event=access c=\\'
    answer = ask(local_server, "GET", "v1/checkauth", Authorization=local_server.token(email))
    assert access(local_server, answer)["user"] == email


def test_the_query_is_not_logged(server: Server):
    put(server, "a", b"content")
    for path in ("a?download=1&token=hush-hush", "none?hush-hush", "v1/list?prefix=hush-hush"):
        assert "?" not in access(server, ask(server, "GET", path))["path"]
    assert "hush-hush" not in server.log()


def test_every_line_is_logfmt(server: Server):
    """Also gunicorn's."""
    for answer, _ in requests_of_all_kinds(server, new_folder()):
        access(server, answer)
    assert_whole_lines(server, 0)
    assert "event=gunicorn pid=" in server.log()


def test_the_longest_line_keeps_its_request_id(local_server: Server):
    """Everything that a client can make long is long; the line's request ID is at its end."""
    target = b"/" + b"%22" * 4000
    head = {"User-Agent": '"' * 8000, "X-Request-ID": f"a{new_folder()}"}
    line = access(local_server, exchange(local_server, request("GET", target, head)))
    assert (line["status"], line["request_id"]) == ("404", head["X-Request-ID"])
    assert line["path"].endswith("[cut]") and line["ua"].endswith("[cut]")
    [whole] = (one for one in local_server.log().split("\n") if head["X-Request-ID"] in one)
    assert 4000 < len(whole.encode()) < select.PIPE_BUF


@pytest.mark.expected_errors("WORKER TIMEOUT", "was sent SIGABRT", "was sent SIGKILL", "SystemExit")
def test_what_gunicorn_says_of_a_worker_that_hangs(start_server: Callable[..., Server]):
    server = start_server(server={"workers": 1}, arguments=["--timeout", "2"])
    os.kill(server.worker_pids()[0], signal.SIGSTOP)
    wait_until(lambda: "WORKER TIMEOUT" in server.log(), SECONDS, "the time-out")
    [line] = (logfmt(line) for line in server.log().split("\n") if "WORKER TIMEOUT" in line)
    assert (line["level"], line["event"], line["pid"]) == ("critical", "gunicorn", str(server.process.pid))
    wait_until(lambda: server.log().count("Booting worker") == 2, SECONDS, "the next worker")
    assert_whole_lines(server, 0)


def test_gunicorns_messages_in_a_file(start_server: Callable[..., Server], tmp_path: Path):
    server = start_server(arguments=["--error-logfile", str(tmp_path / "gunicorn.log")])
    access(server, get(server, "none"))
    lines = [logfmt(line) for line in (tmp_path / "gunicorn.log").read_text().splitlines()]
    assert any("Listening at" in line["message"] for line in lines)
    assert "event=gunicorn" not in server.log()


# Whatever else a process of the server writes

OTHERS = r"""
import logging, sys, threading, warnings
from kci_storage.monitoring import logs

class Broken:
    def __del__(self):
        raise RuntimeError("del")

def fail(depth=60):
    fail_again(depth - 1) if depth else [].pop()

def fail_again(depth):
    fail(depth)  # by turns, since Python shows repeated lines once

logs.configure(debug=False)
logs.take_over()
warnings.warn("one\ntwo")
logging.getLogger("azure.core").error("three\nfour")
logging.getLogger("kci_storage").error("five\nsix")
logging.error("seven %s", "eight")
thread = threading.Thread(target=fail, name="a thread")
thread.start()
thread.join()
broken = Broken()
del broken
try:
    fail()
except IndexError:
    logging.getLogger("kci_storage.test").exception("event=caught request_id=4711")
raise KeyError("nine\nten" * 1000)
"""


def test_all_that_python_writes_is_a_line():
    """Warnings, other libraries' messages, and exceptions that no caller handles; a long traceback keeps its end."""
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    lines = [logfmt(line) for line in done.stderr.splitlines()]
    assert all(len(line.encode()) < select.PIPE_BUF for line in done.stderr.splitlines())
    assert [line["event"] for line in lines] == [
        "warning", "library", "flask", "library", "uncaught", "unraisable", "caught", "uncaught"
    ]  # fmt: skip
    warning, azure, flask, root, thread, unraisable, caught, last = lines
    assert "one\ntwo" in warning["message"]
    assert (azure["logger"], azure["message"], azure["level"]) == ("azure.core", "three\nfour", "error")
    assert (flask["message"], root["message"]) == ("five\nsix", "seven eight")
    for line in (thread, caught):
        assert line["traceback"].startswith("[cut]") and line["traceback"].endswith("IndexError: pop from empty list")
    assert (thread["where"], caught["request_id"]) == ("a thread", "4711")
    assert unraisable["traceback"].endswith("RuntimeError: del")
    assert last["traceback"].endswith("nine\\nten'")


TORN = """
import os, threading
from kci_storage.monitoring import logs

logs.configure(debug=False)
for _ in range(3):
    if os.fork() == 0:
        break
log = logs.log
threads = [
    threading.Thread(target=lambda: [log.info("event=x a=%s b=%d", "y" * (3000 + n), n) for n in range(0, 4000, 8)])
    for _ in range(2)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_lines_of_several_processes_stay_whole_in_a_pipe():
    reader, writer = os.pipe()
    with open(reader) as lines:
        process = subprocess.Popen([sys.executable, "-c", TORN], stderr=writer)
        os.close(writer)
        seen = [logfmt(line.rstrip("\n")) for line in lines]
    assert process.wait(SECONDS) == 0
    assert len(seen) == 4 * 2 * 500
    assert {line["b"] for line in seen} == {str(number) for number in range(0, 4000, 8)}
    assert any(line["a"].endswith("[cut]") for line in seen)


# Tokens


def bad_tokens(server: Server) -> dict[str, str | None]:
    """Authorization headers, by what is wrong with them."""
    claims, secret = {"email": "user@example.com"}, server.secret
    return {
        "no Authorization header": None,
        "an Authorization header of more than": "x" * 8190,
        "neither 'Bearer <token>' nor a token": f"Basic {server.token()}",
        "malformed": "Bearer nonsense",
        "another secret": jwt.encode(claims, "another secret" * 5, algorithm="HS256"),
        "not signed with HS256": jwt.encode(claims, secret * 2, algorithm="HS512"),
        "expired": server.token(exp=1),
        "not yet valid": server.token(nbf=2**33),
        "no claim 'email'": jwt.encode({"sub": "x"}, secret, algorithm="HS256"),
    }


def test_a_refused_token_is_logged_with_its_reason(local_server: Server):
    for reason, authorization in bad_tokens(local_server).items():
        headers = {} if authorization is None else {"Authorization": authorization}
        for method, path in (("GET", "v1/checkauth"), ("PUT", "a"), ("DELETE", "a"), ("POST", "upload")):
            answer = ask(local_server, method, path, **headers)
            if authorization is not None and len(authorization) > 8170:
                assert answer.status_code in (401, 431)  # gunicorn's own limit is near
                continue
            assert (answer.status_code, answer.text) == (401, "Unauthorized")
            assert reason in access(local_server, answer)["error"]
            (line,) = logged(local_server, answer.headers["X-Request-ID"], "auth_failed")
            assert reason in line["reason"] and line["ip"] == "127.0.0.1"


def test_no_token_is_ever_logged(start_server: Callable[..., Server]):
    server = start_server(environ={"STORAGE_DEBUG": "1"})
    server.expected_errors.append("level=debug")
    tokens = [server.token(), server.token("other@example.com", exp=1), "eyJhbGciOiJIUzI1NiJ9.e30.not-a-signature"]
    for token in tokens:
        for authorization in (token, f"Bearer {token}", f"Basic {token}", f"Bearer {token} {token}"):
            headers = {"Authorization": authorization}
            ask(server, "PUT", "a", **headers)
            ask(server, "DELETE", "a", **headers)
            ask(server, "GET", "v1/checkauth", **headers)
            ask(server, "GET", f"none?token={token}", **headers)
            ask(server, "POST", "upload", **headers)
            requests.post(
                f"{server.url}/upload",
                form(part("path", b"x"), part("file0", b"x", "a")),
                headers={**headers, **FORM_TYPE},
                timeout=SECONDS,
            )
    access(server, get(server, ""))
    server.stop()
    log = server.log()
    for secret in (*tokens, *(token.rpartition(".")[2] for token in tokens), server.secret):
        assert secret not in log


# Settings


def test_debug_logging_tells_where_an_error_comes_from(start_server: Callable[..., Server]):
    on = ({"STORAGE_VERBOSE": "1"}, {"STORAGE_DEBUG": "1"})
    for environ, expected in (({}, False), ({"STORAGE_DEBUG": ""}, False), *((environ, True) for environ in on)):
        server = start_server(environ=environ)
        server.expected_errors.append("level=debug")
        access(server, get(server, "none"))
        assert (" level=debug " in server.log()) is expected
    (line,) = (logfmt(line) for line in server.log().split("\n") if " level=debug event=error " in line)
    assert "ObjectNotFound" in line["traceback"].splitlines()[-1]


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_a_short_secret_causes_one_warning(start_server: Callable[..., Server]):
    """Old installations have one, and must go on working."""
    server = start_server(jwt_secret="short", server={"workers": 2})
    assert put(server, "a", b"content").status_code == 201
    assert server.log().count("event=weak_secret") == 1
    assert "short" not in server.log().replace("shorter than", "")


def proxied(server: Server, **headers: str) -> str:
    return access(server, ask(server, "GET", "none", **headers))["ip"]


def test_which_proxies_are_trusted_for_the_address(start_server: Callable[..., Server]):
    forwarded: dict[str, Any] = {"X_Forwarded_For": "10.0.0.1, 10.0.0.2"}
    assert proxied(start_server(), **forwarded) == "127.0.0.1"
    assert proxied(start_server(server={"trusted_proxies": 1}), **forwarded) == "10.0.0.2"
    behind_two = start_server(server={"trusted_proxies": 2})
    assert proxied(behind_two, **forwarded) == "10.0.0.1"
    assert proxied(behind_two, X_Forwarded_For="10.0.0.9") == "127.0.0.1"
    for hostile in ("a b=c", "x" * 3000):
        assert proxied(behind_two, X_Forwarded_For=f"{hostile}, 10.0.0.1") == "127.0.0.1"


def test_a_killed_worker_breaks_no_line(start_server: Callable[..., Server]):
    server = start_server()
    server.expected_errors.append("was sent SIGKILL")
    for pid in server.worker_pids():
        get(server, "none")
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.log().count("Booting worker") == 4, SECONDS, "new workers")
    access(server, get(server, "none"))


@pytest.fixture(scope="module")
def quiet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose log has the messages of a start and a stop."""
    with running(Server(tmp_path_factory.mktemp("quiet"), {})) as server:
        yield server


def test_a_start_says_nothing_but_information(quiet_server: Server):
    levels = set(re.findall(r"\[(INFO|WARNING|ERROR|CRITICAL|DEBUG)\]|level=(\w+)", quiet_server.log()))
    assert levels <= {("INFO", ""), ("", "info")}
