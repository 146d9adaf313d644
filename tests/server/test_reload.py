# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGHUP: the configuration is read again, and requests that it does not concern go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kci_storage.config.settings import RELOADABLE, SECTIONS, Config, ServerConfig, User, settings
from kci_storage.server import reload as master
from tests.server.load import Load, slow_download
from tests.support.harness import Server, running, wait_until
from tests.support.wire import SECONDS, get, new_folder, put

BOT = {"User-Agent": "NastyBot/1.0"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests of this module."""
    with running(Server(tmp_path_factory.mktemp("reload"), {"server": {"threads": 8}})) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The module's server, whose first configuration is restored after each test."""
    document = {key: dict(value) if isinstance(value, dict) else value for key, value in shared.document.items()}
    yield shared
    if shared.document != document:
        shared.document.clear()
        shared.document.update(document)
        reload(shared)


def reload(server: Server) -> str:
    """Reload the configuration; returns the log's lines about that, once no worker uses the old one."""
    before, old = len(server.log()), set(server.worker_pids())
    server.reload()
    wait_until(lambda: "event=reload" in server.log()[before:], SECONDS, "an answer to SIGHUP")
    log = server.log()[before:]
    if "event=reloaded" in log and "new_workers=nothing" in log:
        wait_until(lambda: server.log()[before:].count("event=rules_renewed") == len(old), SECONDS, "the new rules")
    elif "event=reloaded" in log:
        wait_until(lambda: not old & set(server.worker_pids()), SECONDS, "the end of the old workers")
    return log


def refused(server: Server, because: str) -> None:
    """Reload the configuration, and check that it is refused for this reason."""
    server.expected_errors.append("event=reload_refused")
    log = reload(server)
    assert "level=error event=reload_refused" in log
    assert because in log


def test_running_workers_apply_changed_users(server: Server) -> None:
    key, workers = f"{new_folder()}/file", server.worker_pids()
    assert put(server, key, b"1").status_code == 201
    server.document["users"] = [{"name": "somebody@example.com", "prefixes": [""]}]
    assert "changed=users new_workers=nothing" in reload(server)
    for _ in range(6):  # any worker may answer
        assert put(server, key, b"2").status_code == 403
    server.document["users"].append({"name": "user@example.com", "prefixes": ["/"]})
    reload(server)
    for _ in range(6):
        assert put(server, key, b"3").status_code == 200
    assert server.worker_pids() == workers


def test_running_workers_apply_changed_bans_and_limits(server: Server) -> None:
    workers = server.worker_pids()
    assert get(server, "v1/health", BOT).status_code == 200
    server.document["useragent"] = {"ban": ["nastybot"]}
    reload(server)
    for _ in range(6):
        assert get(server, "v1/health", BOT).status_code == 403
    server.document["useragent"] = {}
    server.document["limits"] = {"requests_per_second": 0.001, "burst": 1}
    reload(server)
    assert [get(server, "v1/health", BOT).status_code for _ in range(6)] == [200, *[429] * 5]
    server.document["limits"] = {}
    server.document["block_subnets"] = ["127.0.0.0/8"]
    reload(server)
    for _ in range(6):
        assert get(server, "v1/health").status_code == 403
    assert server.worker_pids() == workers


def test_under_load_no_request_is_lost(server: Server) -> None:
    """Neither short requests nor a long one are cut."""
    key = f"{new_folder()}/small"
    put(server, key, b"content")
    with slow_download(server) as finish, Load(f"{server.url}/{key}", b"content") as load:
        for number in range(4):
            server.document["users"] = [{"name": f"user{number}@example.com", "prefixes": [""]}]
            server.document["useragent"] = {"ban": [f"bot{number}"]}
            reload(server)
            load.wait_for_more()
        finish()
    assert load.failures == []


@pytest.mark.parametrize(
    ("document", "because"),
    [
        ({"server": {"threads": "many"}}, "server.threads: expected a whole number"),
        ({"block_subnets": ["192.0.2.0/33"]}, '192.0.2.0/33\\"'),
        ({"useragent": {"bann": []}}, "did you mean ban?"),
        ({"driver": "nonesuch"}, "no driver 'nonesuch' is installed"),
        ({"jwt_secret": ""}, "jwt_secret: expected text"),
        ({"cache": {"directory": "/dev/null/cache"}}, "cache.directory: expected a folder on a local disk"),
    ],
    ids=["threads", "subnet", "unknown", "driver", "secret", "directory"],
)
def test_an_invalid_configuration_changes_nothing(server: Server, document: dict[str, object], because: str) -> None:
    workers = server.worker_pids()
    for name, value in document.items():
        section = server.document.get(name)
        server.document[name] = {**section, **value} if isinstance(section, dict) else value  # type: ignore[dict-item]
    server.document.setdefault("useragent", {"ban": ["nastybot"]})  # valid, but not applied with the invalid part
    refused(server, because)
    assert get(server, "v1/health", BOT).status_code == 200
    assert server.worker_pids() == workers


def test_after_an_invalid_file_workers_are_still_replaced_and_a_valid_file_is_applied(server: Server) -> None:
    server.expected_errors += ["SIGKILL", "event=reload_refused"]
    good = server.config_path.read_text()
    server.config_path.write_text("this is [no TOML")
    before = len(server.log())
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "event=reload_refused" in server.log()[before:], SECONDS, "the refusal")
    old = server.worker_pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 2, SECONDS, "new workers")
    assert get(server, "v1/health").status_code == 200
    server.config_path.write_text(good)
    server.document["useragent"] = {"ban": ["nastybot"]}
    reload(server)
    for _ in range(6):
        assert get(server, "v1/health", BOT).status_code == 403


def test_a_later_worker_has_the_latest_rules(server: Server) -> None:
    server.expected_errors.append("SIGKILL")
    server.document["useragent"] = {"ban": ["nastybot"]}
    reload(server)
    old = server.worker_pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 2, SECONDS, "new workers")
    assert get(server, "v1/health", BOT).status_code == 403


def test_other_changes_need_new_workers(server: Server) -> None:
    old = set(server.worker_pids())
    server.document["server"]["cache_control"] = "public, max-age=7"
    assert "changed=server.cache_control new_workers=server.cache_control" in reload(server)
    assert not old & set(server.worker_pids())
    key = f"{new_folder()}/file"
    put(server, key, b"content")
    assert get(server, key).headers["Cache-Control"] == "public, max-age=7"


def test_changes_for_the_master_need_a_restart(server: Server) -> None:
    old = server.worker_pids()
    server.document["server"]["threads"] = 9
    before = len(server.log())
    reload(server)
    assert "event=restart_needed changed=server.threads" in server.log()[before:]
    assert server.worker_pids() == old


def test_an_unchanged_configuration_keeps_the_workers(server: Server) -> None:
    old = server.worker_pids()
    assert "changed=nothing new_workers=nothing" in reload(server)
    assert server.worker_pids() == old


def test_changes_are_named_by_their_keys() -> None:
    old = Config(path=Path("x"), jwt_secret="a" * 32)
    new = Config(
        path=Path("x"), jwt_secret="b" * 32, server=ServerConfig(threads=1, workers=3), users=(User("a", ("b",)),)
    )
    assert set(master.changes(old, new)) == {"jwt_secret", "server.threads", "server.workers", "users"}
    assert list(master.changes(old, old)) == []


def test_the_reloadable_names_exist() -> None:
    """A misspelt name would make a reload replace the workers."""
    keys = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in settings(cls)}
    assert set(RELOADABLE) <= {*SECTIONS, *keys, "users", "block_subnets"}
    assert set(master.AT_START) <= keys
