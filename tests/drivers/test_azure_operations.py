# SPDX-License-Identifier: LGPL-2.1-or-later
"""All operations, one by one.

They have the same connections, retries, time-outs, proxies, certificates and errors.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kci_storage.drivers.azure import service
from kci_storage.drivers.azure.driver import AzureDriver
from kci_storage.errors import BackendError, BackendThrottled, BackendTimeout
from tests.drivers.contract import KIB, content_of, delete, get, put
from tests.drivers.test_azure import Answer, Proxy, closing, proxy, small_sizes
from tests.support.azurite import Azurite
from tests.support.certificates import self_signed
from tests.support.faultproxy import Cut, DropAnswer, Fault, FaultProxy, Hint, Hold, Refuse, Say, fault_proxy

__all__ = ["proxy", "small_sizes"]  # fixtures

BLOCK = 64 * KIB
SECONDS = 60
CONTENT = content_of(3 * BLOCK)
Operation = Callable[[AzureDriver], object]

OPERATIONS: dict[str, Operation] = {
    "stat": lambda driver: driver.stat("a"),
    "read": lambda driver: get(driver, "a"),
    "put": lambda driver: put(driver, "b", b"small"),
    "put in blocks": lambda driver: put(driver, "b", CONTENT),
    "list": lambda driver: driver.list(),
    "list names": lambda driver: driver.list(details=False),
    "list a folder": lambda driver: driver.list(delimiter="/"),
    "delete": lambda driver: delete(driver, "a"),
    "fence": lambda driver: driver.fence("a", driver.stat("a").etag),
    "probe": lambda driver: driver.probe(),
}


def do_all(driver: AzureDriver) -> None:
    """Ask the backend everything."""
    for name, operation in OPERATIONS.items():
        if name == "fence":
            put(driver, "a", CONTENT)  # it has been deleted before
        operation(driver)


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    """Everything that asks the backend."""
    return OPERATIONS[request.param]


@pytest.fixture
def faults(azurite: Azurite) -> Iterator[FaultProxy]:
    """A proxy in front of the emulator that fails as it is told."""
    with fault_proxy(azurite) as faults:
        yield faults


@pytest.fixture
def driver(azurite: Azurite, faults: FaultProxy, small_sizes: None) -> Iterator[AzureDriver]:
    """A driver behind it, with an object ``a`` and a connection that is idle."""
    settings = azurite.settings(endpoint=faults.endpoint, read_timeout=20.0)
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        put(driver, "a", CONTENT)
        yield driver


def test_a_connection_that_a_relay_has_dropped_is_no_failure(
    driver: AzureDriver, faults: FaultProxy, operation: Operation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost one of the retries, or their wait."""
    monkeypatch.setattr(service, "RETRIES", 0)
    dropped = faults.inject(Refuse(), kind=None, times=1)
    operation(driver)
    assert dropped.hits == 1


def test_all_operations_have_one_pool(driver: AzureDriver, faults: FaultProxy) -> None:
    connections = set(faults._open)
    for name in ("stat", "list", "put", "list a folder", "probe", "delete"):
        OPERATIONS[name](driver)
        assert connections >= faults._open, f"{name} made another connection"


def test_interim_answers_are_read_past(driver: AzureDriver, faults: FaultProxy, operation: Operation) -> None:
    hinted = faults.inject(Hint(), kind=None)
    operation(driver)
    assert hinted.hits


def test_what_fails_for_a_moment_is_asked_again(
    driver: AzureDriver, faults: FaultProxy, operation: Operation
) -> None:
    failing = faults.inject(Say(503, "ServerBusy", retry_after=1), kind=None, times=service.RETRIES)
    operation(driver)
    assert failing.hits == service.RETRIES


def test_a_busy_backend_is_asked_a_few_times_and_says_when_to_come_back(
    driver: AzureDriver, faults: FaultProxy, operation: Operation
) -> None:
    busy = faults.inject(Say(503, "ServerBusy", retry_after=17), kind=None)
    with pytest.raises(BackendThrottled) as caught:
        operation(driver)
    assert caught.value.retry_after == 17
    assert busy.hits == service.RETRIES + 1 or operation is OPERATIONS["put in blocks"]


UPLOADS = ("put", "put in blocks")


@pytest.fixture
def patient(azurite: Azurite, faults: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureDriver]:
    """A driver behind the proxy whose uploads are retried for a minute."""
    monkeypatch.setattr(service, "RETRY_WAIT", 0.1)
    settings = azurite.settings(endpoint=faults.endpoint, retry_timeout=SECONDS)
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        yield driver


@pytest.mark.parametrize("name", UPLOADS)
@pytest.mark.parametrize(
    "fault",
    [Say(503, "ServerBusy"), Say(500, "InternalError"), Refuse(), DropAnswer()],
    ids=["busy", "broken", "reset", "lost answers"],
)
def test_an_upload_survives_what_a_download_survives(
    patient: AzureDriver, faults: FaultProxy, name: str, fault: Fault
) -> None:
    """More than two retries bridge. What is stored is one version, that of the upload."""
    requests = 1 if name == "put" else 3
    failing = faults.inject(fault, kind=None, times=requests * (service.RETRIES + 1) + 1)
    info = OPERATIONS[name](patient)
    assert failing.hits == requests * (service.RETRIES + 1) + 1
    assert patient.stat("b") == info
    assert get(patient, "b") == (b"small" if name == "put" else CONTENT)


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_survives_a_backend_that_is_away(patient: AzureDriver, faults: FaultProxy, name: str) -> None:
    """It refuses connections."""
    faults.go_away()
    ending = threading.Timer(2, faults.come_back)
    ending.start()
    OPERATIONS[name](patient)
    ending.join()
    assert get(patient, "b") == (b"small" if name == "put" else CONTENT)


def test_silence_about_a_block_is_no_end(azurite: Azurite, faults: FaultProxy) -> None:
    """It does not matter whether it was stored. Of a commit it does, so that is given up; see docs/consistency.md."""
    settings = azurite.settings(endpoint=faults.endpoint, retry_timeout=SECONDS, read_timeout=2.0)
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        silent = faults.inject(Hold(), kind=None, times=2, operation="PUT block")
        OPERATIONS["put in blocks"](driver)
        assert silent.hits == 2
        silent.end()
        assert get(driver, "b") == CONTENT
        silent = faults.inject(Hold(), kind=None, times=1, operation="PUT")
        with pytest.raises(BackendTimeout):
            put(driver, "c", b"small")
        silent.end()


def test_an_upload_comes_back_when_the_backend_says(patient: AzureDriver, faults: FaultProxy) -> None:
    busy = faults.inject(Say(503, "ServerBusy", retry_after=2), kind=None, times=1)
    started = time.monotonic()
    OPERATIONS["put"](patient)
    assert busy.hits == 1
    assert 2 <= time.monotonic() - started < SECONDS


@pytest.mark.parametrize("name", UPLOADS)
def test_patience_ends(azurite: Azurite, faults: FaultProxy, name: str, small_sizes: None) -> None:
    settings = azurite.settings(endpoint=faults.endpoint, retry_timeout=1.0)
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        busy = faults.inject(Say(503, "ServerBusy"), kind=None)
        with pytest.raises(BackendThrottled):
            OPERATIONS[name](driver)
        assert busy.hits > service.RETRIES


def test_a_read_is_not_as_patient(patient: AzureDriver, faults: FaultProxy) -> None:
    """Its client has nothing to lose yet."""
    busy = faults.inject(Say(503, "ServerBusy"), kind=None)
    for number, name in enumerate(("stat", "read", "list", "probe"), start=1):
        with pytest.raises(BackendThrottled):
            OPERATIONS[name](patient)
        assert busy.hits == number * (service.RETRIES + 1)


def test_a_refusal_is_not_asked_again(driver: AzureDriver, faults: FaultProxy) -> None:
    refused = faults.inject(Say(400, "InvalidInput"), kind=None)
    for number, name in enumerate(["stat", "read", "put", "list", "list a folder", "delete"], start=1):
        with pytest.raises(BackendError, match="InvalidInput"):
            OPERATIONS[name](driver)
        assert refused.hits == number


@pytest.mark.parametrize("name", ["stat", "read", "put", "list", "list a folder", "delete"])
def test_silence_is_a_time_out_and_not_asked_again(azurite: Azurite, faults: FaultProxy, name: str) -> None:
    settings = azurite.settings(endpoint=faults.endpoint, read_timeout=1.0)
    with closing(AzureDriver(settings)) as driver:
        put(driver, "a", b"content")
        silent = faults.inject(Hold(), kind=None)
        started = time.monotonic()
        with pytest.raises(BackendTimeout):
            OPERATIONS[name](driver)
        assert time.monotonic() - started >= 1
        silent.wait_until_reached()
        assert silent.hits == 1
        silent.end()


@pytest.mark.parametrize("name", ["list", "list names", "list a folder"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_listing_that_breaks_off_is_asked_for_again(
    driver: AzureDriver, faults: FaultProxy, name: str, reset: bool
) -> None:
    cut = faults.inject(Cut(after=100, reset=reset), kind="other", times=service.RETRIES)
    OPERATIONS[name](driver)
    assert cut.hits == service.RETRIES
    faults.inject(Cut(after=100, reset=reset), kind="other")
    with pytest.raises(BackendError, match="broke off"):
        OPERATIONS[name](driver)


def test_something_that_is_no_listing_is_an_error(driver: AzureDriver, proxy: Proxy, azurite: Azurite) -> None:
    proxy.before = lambda request: Answer(200, [("Content-Type", "text/html")], b"<html>Log in here</html>")
    with closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint))) as other:
        for name in ("list", "list names", "list a folder"):
            with pytest.raises(BackendError, match="makes no sense"):
                OPERATIONS[name](other)


def test_the_protocol_has_one_version(driver: AzureDriver, proxy: Proxy, azurite: Azurite) -> None:
    with closing(AzureDriver(azurite.settings(endpoint=proxy.endpoint), block_size=BLOCK)) as other:
        put(other, "a", CONTENT)
        do_all(other)
    assert len({request.headers["x-ms-version"] for request in proxy.requests}) == 1
    assert all(len(request.headers.get_all("x-ms-client-request-id")) == 1 for request in proxy.requests)


# The environment


def test_a_proxy_of_the_environment_is_used(azurite: Azurite, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = azurite.settings(endpoint=f"http://azurite.example/{azurite.account}")
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("http_proxy", proxy.url)
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        put(driver, "a", CONTENT)
        do_all(driver)
    assert proxy.requests
    assert {request.path.partition("azurite.example")[0] for request in proxy.requests} == {"http://"}


def test_a_host_without_a_proxy_is_asked_directly(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = azurite.settings()
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    with closing(AzureDriver(settings, block_size=BLOCK)) as driver:
        put(driver, "a", CONTENT)
        do_all(driver)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1, in one file; the certificate alone is beside it (``.crt``)."""
    return self_signed(tmp_path_factory.mktemp("tls")).both


@contextlib.contextmanager
def over_tls(azurite: Azurite, proxy: Proxy, certificate: Path, **settings: Any) -> Iterator[AzureDriver]:
    """A driver that reaches the emulator by TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy.server.socket = context.wrap_socket(proxy.server.socket, server_side=True, do_handshake_on_connect=False)
    endpoint = proxy.endpoint.replace("http://", "https://")
    with closing(AzureDriver(azurite.settings(endpoint=endpoint, **settings), block_size=BLOCK)) as driver:
        yield driver


CERTIFICATES = ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]


@pytest.mark.parametrize("variable", CERTIFICATES)
def test_a_certificate_of_the_environment_is_trusted(
    azurite: Azurite, proxy: Proxy, certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in CERTIFICATES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(certificate.with_suffix(".crt")))
    with over_tls(azurite, proxy, certificate) as driver:
        put(driver, "a", CONTENT)
        do_all(driver)


def test_no_other_certificate_is_trusted(
    azurite: Azurite, proxy: Proxy, certificate: Path, operation: Operation, small_sizes: None
) -> None:
    with over_tls(azurite, proxy, certificate) as driver, pytest.raises(BackendError) as caught:
        operation(driver)
    assert "CERTIFICATE_VERIFY_FAILED" in (caught.value.detail or "")
    assert proxy.requests == []
