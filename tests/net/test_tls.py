# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS without a proxy: everything works as without TLS, and hostile clients delay no other client."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from kci_storage.config.settings import ConfigError
from kci_storage.server import preflight
from tests.support.certificates import self_signed
from tests.support.harness import Server, running, toml, wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Wire,
    access,
    chunked,
    exchange,
    form,
    get,
    new_folder,
    part,
    post,
    put,
    request,
    stored_by_another_program,
)

MIB = 1 << 20


def certificate(folder: Path, name: str) -> dict[str, Path]:
    """The settings of ``[server]`` for a new certificate of this machine."""
    files = self_signed(folder, name)
    return {"certfile": files.certificate, "keyfile": files.key}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A certificate that this process's clients trust."""
    files = certificate(tmp_path_factory.mktemp("certificate"), "first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUESTS_CA_BUNDLE", str(files["certfile"]))
        yield files


@pytest.fixture(scope="module")
def server(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with TLS and few threads."""
    document = {"server": {"workers": 2, "threads": 2, **files}}
    with running(Server(tmp_path_factory.mktemp("tls"), document)) as server:
        yield server


class TlsWire(Wire):
    """A TLS connection on which a test chooses each byte of plain text."""

    def __init__(self, server: Server, receive_buffer: int | None = None):
        super().__init__(server, receive_buffer)
        context = ssl.create_default_context(cafile=os.environ["REQUESTS_CA_BUNDLE"])
        self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1", suppress_ragged_eofs=False)

    @property
    def certificate(self) -> bytes | None:
        """The server's certificate."""
        return self._socket.getpeercert(binary_form=True)  # type: ignore[attr-defined]

    def ends(self) -> bool:
        """Whether the server ends the connection with close_notify."""
        return self.read(1) == b""


# As without TLS


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 64 * 1024 + 1, 5 * MIB + 7])
def test_a_file_is_uploaded_and_downloaded(server: Server, size: int) -> None:
    key, content = f"{new_folder()}/file", os.urandom(size)
    assert put(server, key, content).status_code == 201
    answer = get(server, key)
    assert (answer.content, answer.headers["X-Cache"]) == (content, "hit")
    assert access(server, answer)["bytes"] == str(size)
    if size > 1:
        part_of_it = get(server, key, {"Range": "bytes=1-70000"})
        assert (part_of_it.status_code, part_of_it.content) == (206, content[1:70001])
    assert get(server, key, {"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert requests.head(f"{server.url}/{key}", timeout=SECONDS).headers["Content-Length"] == str(size)


def test_several_ranges_of_a_file(server: Server) -> None:
    key, content = f"{new_folder()}/file", os.urandom(MIB)
    put(server, key, content)
    answer = get(server, key, {"Range": "bytes=0-99,500000-899999"})
    assert answer.status_code == 206
    assert content[:100] in answer.content
    assert content[500_000:900_000] in answer.content


def test_forms_and_chunked_bodies(server: Server) -> None:
    folder, content = new_folder(), os.urandom(3 * MIB)
    assert post(server, part("path", folder.encode()), part("file0", content, "a"), part("file1", b"b", "b")).ok
    pieces = (content[at : at + 100_000] for at in range(0, len(content), 100_000))
    headers = {**server.headers(), **FORM_TYPE}
    assert put(server, f"{folder}/c", pieces).status_code == 201
    assert [get(server, f"{folder}/{name}").content for name in "abc"] == [content, b"b", content]
    body = chunked(form(part("path", folder.encode()), part("file0", b"d", "d")))
    with TlsWire(server) as wire:
        wire.send(request("POST", "/upload", {**headers, "Transfer-Encoding": "chunked"}, body))
        assert wire.answer().status == 200


def test_a_refused_upload_is_refused_before_it_is_sent(server: Server) -> None:
    with TlsWire(server) as wire:
        wire.send(request("PUT", f"/{new_folder()}/x", {"Content-Length": 10 * MIB, "Expect": "100-continue"}))
        assert wire.answer().status == 401
        assert wire.ends()
    with TlsWire(server) as wire:
        headers = {**server.headers(), "Content-Length": 3, "Expect": "100-continue"}
        wire.send(request("PUT", f"/{new_folder()}/x", headers))
        assert wire.head().status == 100
        wire.send(b"abc")
        assert wire.answer().status == 201


def test_curl_can_upload_and_download(server: Server, files: dict[str, Path], tmp_path: Path) -> None:
    folder, content = new_folder(), os.urandom(2 * MIB)
    (tmp_path / "file").write_bytes(content)
    curl = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(files["certfile"])]
    authorization = ["-H", f"Authorization: Bearer {server.token()}"]
    uploads = [["-T", str(tmp_path / "file"), f"{server.url}/{folder}/put"]]
    uploads += [["-F", f"path={folder}", "-F", f"file0=@{tmp_path}/file;filename=form", f"{server.url}/upload"]]
    for upload in uploads:
        subprocess.run([*curl, *authorization, *upload], check=True, capture_output=True, timeout=SECONDS)
    for name in ("put", "form"):
        done = subprocess.run(
            [*curl, f"{server.url}/{folder}/{name}"], check=True, capture_output=True, timeout=SECONDS
        )
        assert done.stdout == content


def test_a_cold_object(start_server: Callable[..., Server], files: dict[str, Path]) -> None:
    server = start_server("azure", server={"workers": 1, **files})
    key, content = f"{new_folder()}/file", os.urandom(9 * MIB)
    put(server, key, content)
    server.stop()
    shutil.rmtree(server.cache_directory)
    server.start()
    answer = get(server, key)
    assert (answer.headers["X-Cache"], answer.content == content) == ("miss", True)


# Connections


def test_many_requests_on_a_connection(server: Server) -> None:
    with TlsWire(server) as wire:
        for _ in range(20):
            wire.send(request("GET", "/v1/health"))
            assert wire.answer().body == b"ok"


def test_requests_that_come_at_once(server: Server) -> None:
    """Bytes decrypted together with the first request are not lost, although polling does not report them."""
    with TlsWire(server) as wire:
        wire.send(*[request("GET", "/v1/health")] * 40)
        for _ in range(40):
            assert wire.answer().body == b"ok"


class Records:
    """A connection on which a test chooses where TLS records end, and which bytes are sent together."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=os.environ["REQUESTS_CA_BUNDLE"])
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")

    def send(self, *records: bytes) -> None:
        """Send each piece as a TLS record of its own, all by one system call."""
        for record in records:
            self.tls.write(record)
        self.flush()

    def flush(self, size: int = 1 << 20) -> None:
        """Send the encrypted bytes in pieces of the given size."""
        data = self._outgoing.read()
        for at in range(0, len(data), size):
            self._socket.sendall(data[at : at + size])

    def read_until(self, end: bytes) -> bytes:
        """Receive up to and including this text."""
        data = b""
        while not data.endswith(end):
            data += self._patiently(lambda: self.tls.read(1 << 16))
        return data

    def shake_hands(self, size: int = 1 << 20) -> None:
        """Send the handshake in pieces of the given size."""
        self._patiently(self.tls.do_handshake, size)
        self.flush(size)

    def _patiently(self, step: Callable[[], Any], size: int = 1 << 20) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.flush(size)
                data = self._socket.recv(1 << 16)
                assert data, "the connection ended"
                self._incoming.write(data)


@contextlib.contextmanager
def records(server: Server) -> Iterator[Records]:
    """A connection, before the TLS handshake."""
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Records(sock)


def assert_a_request_may_come_with_a_body(server: Server) -> None:
    """The request was received with the body, but not decrypted, and polling the socket does not report it."""
    headers = {**server.headers(), "Content-Length": 5, "Expect": "100-continue"}
    with records(server) as client:
        client.shake_hands()
        client.send(request("PUT", f"/{new_folder()}/x", headers))
        assert b"100 Continue" in client.read_until(b"\r\n\r\n")
        client.send(b"bytes", request("GET", "/v1/health"))
        client.read_until(b"ok")


def test_a_request_may_come_with_a_body(server: Server) -> None:
    assert_a_request_may_come_with_a_body(server)


def test_a_handshake_may_come_byte_by_byte(server: Server) -> None:
    with records(server) as client:
        client.shake_hands(size=1)
        client.tls.write(request("GET", "/v1/health"))
        client.flush(size=1)
        assert client.read_until(b"ok").startswith(b"HTTP/1.1 200")


def test_a_head_of_several_records(server: Server) -> None:
    head = request("GET", "/v1/health", {f"X-{number}": "x" * 4000 for number in range(8)})
    with TlsWire(server) as wire:
        wire.send(head)
        assert wire.answer().body == b"ok"
        for byte in request("GET", "/v1/health"):
            wire.send(bytes([byte]))
        assert wire.answer().body == b"ok"


def test_a_head_that_is_too_long(server: Server) -> None:
    head = request("GET", "/v1/health", {f"X-{number}": "x" * 8000 for number in range(20)})
    with TlsWire(server) as wire:
        with contextlib.suppress(OSError):
            wire.send(head[:-2])
        assert wire.answer().status == 431


def test_a_complete_response_ends_with_close_notify(server: Server) -> None:
    """Otherwise an attacker on the way could cut a response unnoticed."""
    with TlsWire(server) as wire:
        wire.send(request("GET", "/v1/health", {"Connection": "close"}))
        assert wire.answer().body == b"ok"
        assert wire.ends()


def test_a_clients_close_notify_is_answered(server: Server) -> None:
    with TlsWire(server) as wire:
        wire.send(request("GET", "/v1/health"))
        assert wire.answer().body == b"ok"
        assert wire._socket.unwrap() is not None  # type: ignore[attr-defined]  # the server has sent close_notify


def test_plain_http_gets_an_explanation(server: Server) -> None:
    answer = exchange(server, request("GET", "/v1/health"))
    assert (answer.status, answer.body) == (400, b"this port speaks HTTPS\n")
    assert access(server, answer)["status"] == "400"


@pytest.mark.parametrize("garbage", [b"\x00" * 300, b"\x16\x03\x01\xff\xff" + b"x" * 400, b"SSH-2.0-x\r\n" * 30])
def test_garbage_ends_the_connection(server: Server, garbage: bytes) -> None:
    with Wire(server) as wire:
        wire.send(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert len(wire.read(1000)) < 1000
    assert get(server, "v1/health").ok


def test_old_versions_are_refused(server: Server) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):  # noqa: PT030  (its text is Python's)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as sock, pytest.raises(OSError):  # noqa: PT011
        context.wrap_socket(sock)


# Slow and hostile clients


def client_hello() -> bytes:
    """The first message of a handshake."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="storage")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def test_handshakes_that_never_end_hold_up_no_other_client(server: Server) -> None:
    hello = client_hello()
    with contextlib.ExitStack() as stack:
        for sent in (b"", hello[:100], hello) * 5:  # more than there are threads
            stack.enter_context(Wire(server)).send(sent)
        for _ in range(4):
            assert get(server, "v1/health").ok


def test_slow_readers_cost_no_threads_and_get_the_whole_file(server: Server) -> None:
    key, content = f"{new_folder()}/large", os.urandom(MIB) * 24
    stored_by_another_program(server, key, content)
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(TlsWire(server, receive_buffer=4096)) for _ in range(8)]
        for wire in wires:
            wire.send(request("GET", f"/{key}"))
            assert wire.head().status == 200
        for _ in range(4):
            assert get(server, "v1/health").ok
        assert wires[0].read(len(content)) == content
        wires[0].send(request("GET", "/v1/health"))
        assert wires[0].answer().body == b"ok"


def test_a_client_that_stalls_within_a_request_is_dropped_and_an_idle_one_is_not(
    start_server: Callable[..., Server], files: dict[str, Path]
) -> None:
    """Browsers open connections in advance, with the handshake."""
    server = start_server(server={"send_timeout": 2, "threads": 1, **files})
    key, hello = f"{new_folder()}/large", client_hello()
    stored_by_another_program(server, key, os.urandom(MIB) * 24)
    upload = request("PUT", f"/{new_folder()}/x", {**server.headers(), "Content-Length": 1000})
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(TlsWire(server))
        shaking = [stack.enter_context(Wire(server)) for _ in range(2)]
        for wire, sent in zip(shaking, (hello[:100], hello), strict=True):
            wire.send(sent)
        uploading = stack.enter_context(TlsWire(server))
        uploading.send(upload, b"x" * 10)
        reading = stack.enter_context(TlsWire(server, receive_buffer=4096))
        reading.send(request("GET", f"/{key}"))
        assert int(access(server, reading.head())["bytes"]) < 24 * MIB
        assert uploading.answer().status == 400
        assert uploading.ends()
        for wire in shaking:
            with contextlib.suppress(ConnectionResetError):
                wire.read(1 << 20)  # the rest
        waiting.send(request("GET", "/v1/health"))
        assert waiting.answer().body == b"ok"
    assert_a_request_may_come_with_a_body(server)  # in the main loop, since there is one thread


# The certificate


def test_a_reload_applies_a_new_certificate(server: Server, files: dict[str, Path], tmp_path: Path) -> None:
    """The files keep their names, and open connections are kept."""
    with TlsWire(server) as old:
        before = old.certificate
        for name, path in certificate(tmp_path, "second").items():
            files[name].write_bytes(path.read_bytes())
        since = len(server.log())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: server.log()[since:].count("event=rules_renewed") == 2, SECONDS, "the reload")
        for _ in range(4):
            with TlsWire(server) as new:  # a client that trusts only the new one
                assert new.certificate != before
        old.send(request("GET", "/v1/health"))
        assert old.answer().body == b"ok"


def test_an_invalid_certificate_is_refused_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    other = certificate(tmp_path, "other")
    (tmp_path / "broken.pem").write_text("no certificate")
    cases = [
        ({"certfile": tmp_path / "nowhere.pem"}, "No such file"),
        ({"certfile": tmp_path / "broken.pem"}, "server.certfile"),
        ({"certfile": files["certfile"], "keyfile": other["keyfile"]}, "KEY_VALUES_MISMATCH"),
        ({"certfile": files["certfile"]}, "server.certfile"),
        ({"keyfile": files["keyfile"]}, "expected with server.keyfile, it is missing"),
    ]
    for section, because in cases:
        document = {"driver": "local", "jwt_secret": "s" * 32, "server": section}
        (tmp_path / "config.toml").write_text(toml(document))
        with pytest.raises(ConfigError, match=because) as refused:
            preflight.usable(tmp_path / "config.toml")
        assert len(str(refused.value).splitlines()) == 1


def test_key_and_certificate_may_be_in_one_file_beside_the_configuration(tmp_path: Path) -> None:
    self_signed(tmp_path, "all")
    (tmp_path / "config.toml").write_text(
        toml({"driver": "local", "jwt_secret": "s" * 32, "server": {"certfile": "all.pem"}})
    )
    assert preflight.usable(tmp_path / "config.toml").server.certfile == str(tmp_path / "all.pem")
