# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for all tests: servers with both drivers. Skips can be forbidden, and no process may be left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias, TypeVar

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support.harness", "tests.drivers.contract", "tests.support.cold")

from tests.support.azurite import azurite  # noqa: E402, F401  (a fixture)
from tests.support.cold import bench, new_bench, shared_bench  # noqa: E402, F401  (fixtures)
from tests.support.harness import Server, running  # noqa: E402
from tests.support.leftovers import pytest_sessionstart  # noqa: E402, F401  (a hook)

# By default an example may take 200 ms, which is a matter of the machine's load, and examples are others each time.
# `pytest --hypothesis-profile=random` looks for new ones.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("random"), derandomize=True, database=None)
settings.load_profile("same")

NO_SKIP_VARIABLE = "KCI_STORAGE_NO_SKIP"  # if set, a test that would be skipped fails, with the reason


def pytest_configure(config: pytest.Config) -> None:
    """Register our markers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it
    os.umask(0o022)  # some tests look at a file's mode, or as another user at a folder
    config.addinivalue_line(
        "markers", "expected_errors(*patterns): lines of the server's log that match one of these are no failure"
    )


# Skips

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
Wrapper: TypeAlias = Generator[None, Report, Report]  # a hook around another one, whose result comes from its `yield`


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get(NO_SKIP_VARIABLE) and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"nothing may be skipped here ({NO_SKIP_VARIABLE} is set): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Wrapper[pytest.TestReport]:
    """A skipped test."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Wrapper[pytest.CollectReport]:
    """A skipped module."""
    report = yield
    _forbid_skip(report)
    return report


# Servers

OPTIONS = ("environ", "arguments", "wrapper")


@pytest.fixture
def start_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    """Starts a server for this test alone: ``start_server("azure", server={"workers": 3}, users=[…])``.

    Keyword arguments are the configuration's top-level keys and sections; those in ``OPTIONS`` are
    :class:`~tests.support.harness.Server`'s. The server is stopped and must be clean at the end of the test.
    """
    with ExitStack() as stack:

        def start(driver: str = "local", **options: Any) -> Server:
            document = _document(driver, request, options)
            server = Server(tmp_path_factory.mktemp("server"), document, **_server_options(options))
            server.expected_errors += _expected_errors(request)
            return stack.enter_context(running(server))

        yield start


def _server_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in OPTIONS if name in options}


def _document(driver: str, request: pytest.FixtureRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    document = {name: value for name, value in options.items() if name not in OPTIONS}
    if driver == "azure":
        document["azure"] = {**_container(request), **document.get("azure", {})}
    return {"driver": driver, **document}


def _container(request: pytest.FixtureRequest) -> dict[str, str]:
    """The ``[azure]`` section for a new container in Azurite."""
    service = request.getfixturevalue("azurite")
    return {
        "account": service.account,
        "key": service.key,
        "endpoint": service.endpoint,
        "container": service.new_container(),
    }


def _expected_errors(request: pytest.FixtureRequest) -> list[str]:
    return [pattern for mark in request.node.iter_markers("expected_errors") for pattern in mark.args]


@pytest.fixture(scope="session")
def shared_local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the fixture ``local_server``."""
    with running(Server(tmp_path_factory.mktemp("local"), {"driver": "local"})) as server:
        yield server


@pytest.fixture(scope="session")
def shared_azure_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the fixture ``azure_server``."""
    with running(Server(tmp_path_factory.mktemp("azure"), _document("azure", request, {}))) as server:
        yield server


def _watched(server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A shared server, whose log must have no error from this test."""
    before = len(server.log())
    server.expected_errors += _expected_errors(request)
    yield server
    server.assert_no_trouble(since=before)


@pytest.fixture
def local_server(shared_local_server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with the local driver and the default configuration, shared by many tests: use new keys."""
    yield from _watched(shared_local_server, request)


@pytest.fixture
def azure_server(shared_azure_server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The same with Azurite."""
    yield from _watched(shared_azure_server, request)


@pytest.fixture(params=["local", "azure"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both of them in turn."""
    chosen: Server = request.getfixturevalue(f"{request.param}_server")
    return chosen
