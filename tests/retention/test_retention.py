# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retention: the tags of objects, and the deletion of expired ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from kci_storage.config.ages import OWNER, days_of
from kci_storage.config.reading import load
from kci_storage.config.settings import ConfigError, RetentionConfig, RetentionRule
from kci_storage.drivers.local.driver import LocalDriver
from kci_storage.retention import expire
from kci_storage.retention.tags import SECONDS_PER_DAY, Retention, is_expired, lifecycle_policy
from kci_storage.services import build_services
from tests.archives.test_archive import post as post_archive
from tests.archives.test_unpacking import ZEROS, entry
from tests.server.test_reload import reload
from tests.support.azurite import Azurite
from tests.support.harness import Server, toml, wait_until
from tests.support.wire import (
    SECONDS,
    Wire,
    get,
    keys,
    part,
    put,
    request,
    stored_by_another_program,
    wait_until_tidy,
)
from tests.support.wire import post as post_form

RULES = {
    "tag_value": "6m",
    "rules": [
        {"prefix": "/mainline", "value": "2y"},
        {"prefix": "mainline/v6.12/", "value": ""},
        {"prefix": "/next/2*", "value": "30d"},
    ],
}
USER = "someone+ci@example.com"
OWNED = {OWNER: "someone+ci_example.com"}

# A process whose clock is a number of days ahead.
_LATER = """
import sys, time
now, days = time.time, float(sys.argv.pop(1))
time.time = lambda: now() + days * 86400
from kci_storage.cli.main import main
sys.exit(main())
"""


def config(**values: Any) -> RetentionConfig:
    """The section, as read from a file."""
    rules = tuple(RetentionRule(**rule) for rule in values.pop("rules", ()))
    return RetentionConfig(**values, rules=rules)


# Which tags


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a", "6m"),
        ("mainlined/a", "6m"),
        ("mainline", "2y"),
        ("mainline/v6.1/a", "2y"),
        ("mainline/v6.12x/a", "2y"),
        ("mainline/v6.12/a", None),
        ("next/2026/a", "30d"),
        ("next/1", "6m"),
    ],
)
def test_the_longest_prefix_counts(key: str, value: str | None):
    expected = OWNED if value is None else {**OWNED, "retention": value}
    assert Retention(config(**RULES)).tags(USER, key) == expected
    backwards = {**RULES, "rules": RULES["rules"][::-1]}
    assert Retention(config(**backwards)).tags(USER, key) == expected


def test_rules_alone_are_enough():
    rules = Retention(config(tag_key="keep", rules=[{"prefix": "a", "value": "1d"}]))
    assert rules.tags("u", "a/b") == {OWNER: "u", "keep": "1d"}
    assert rules.tags("u", "b") == {OWNER: "u"}


def test_without_a_section_there_are_no_tags():
    assert Retention(RetentionConfig()).tags(USER, "a") == {}


@pytest.mark.parametrize(
    ("email", "value"), [("é@x\n/:=_.-+ 1", "__x_/:=_.-+ 1"), ("a" * 300, "a" * 256), ("文", "_")]
)
def test_what_azure_refuses_in_an_owner_is_replaced(email: str, value: str):
    assert Retention(config(tag_value="1d")).tags(email, "a")[OWNER] == value


@pytest.mark.parametrize(("age", "days"), [("1d", 1), ("90d", 90), ("1m", 31), ("2m", 61), ("24m", 730), ("1y", 365)])
def test_ages_are_whole_days(age: str, days: int):
    assert days_of(age) == days
    kept, gone = days * SECONDS_PER_DAY, days * SECONDS_PER_DAY + 1
    assert not is_expired({"retention": age}, "retention", 1000, 1000 + kept)
    assert is_expired({"retention": age}, "retention", 1000, 1000 + gone)


@pytest.mark.parametrize(
    "tags", [{}, {"retention": ""}, {"retention": "standard"}, {"keep": "1d"}, {"retention": "0d"}]
)
def test_what_has_no_age_never_expires(tags: Mapping[str, str]):
    assert not is_expired(tags, "retention", 0, 1e12)


# The configuration


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'tag_value = "6 months"',
            'retention.tag_value: expected nothing or an age such as 30d, 6m or 2y, got "6 months"',
        ),
        ('tag_value = "0d"', "retention.tag_value: expected nothing or an age"),
        ("tag_value = 6", "retention.tag_value: expected nothing or an age"),
        ('tag_key = ""', "retention.tag_key: expected 1 to 128 letters"),
        ('tag_key = "a@b"', "retention.tag_key: expected 1 to 128 letters"),
        ('tag_key = "owner"', "but not owner"),
        ('value = "6m"', "retention.value: unknown key; did you mean tag_value?"),
        ("rules = 1", "retention.rules: expected one section [[retention.rules]] for each rule"),
        ("rules = [1]", "retention.rules: expected one section [[retention.rules]] for each rule"),
        ('[[retention.rules]]\nprefix = "a"', "retention.rules #1 value: expected in each rule, it is missing"),
        ('[[retention.rules]]\nvalue = "1d"', "retention.rules #1 prefix: expected in each rule, it is missing"),
        ('[[retention.rules]]\nprefix = "a"\nvalue = "x"', "retention.rules #1 value: expected nothing or an age"),
        ('[[retention.rules]]\nprefix = 1\nvalue = ""', "retention.rules #1 prefix: expected text"),
        ('[[retention.rules]]\nprefix = ""\nvalue = ""\nx = 1', "retention.rules #1 x: unknown key"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, says: str):
    path = tmp_path / "config.toml"
    path.write_text(f'driver = "local"\njwt_secret = "{"s" * 32}"\n[retention]\n{text}\n')
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# Over HTTP


def send(server: Server, folder: str) -> dict[str, str]:
    """Upload in each way, as a user; returns the keys of the stored objects, by the way."""
    headers = {"Authorization": f"Bearer {server.token(USER)}"}
    assert post_form(server, part("path", folder.encode()), part("file0", b"1", "form"), headers=headers).ok
    assert post_form(server, part("file0", b"1", "spooled"), part("path", folder.encode()), headers=headers).ok
    assert post_archive(server, folder, entry("archive", b"2") + ZEROS, headers=headers).ok
    for name, content in (("put", b"3"), ("large put", bytes(20_000_000))):
        assert put(server, f"{folder}/{name.replace(' ', '-')}", content, **headers).ok
    return {name: f"{folder}/{name}" for name in ("form", "spooled", "archive", "put", "large-put")}


def test_azure_gets_the_tags_with_each_upload(start_server: Callable[..., Server], azurite: Azurite):
    server = start_server("azure", retention=RULES)
    with azurite.client(server.document["azure"]["container"]) as container:
        for folder, value in (("mainline/v6.1", "2y"), ("mainline/v6.12", None), ("other", "6m")):
            for way, key in send(server, folder).items():
                tags = container.get_blob_client(key).get_blob_tags()
                assert tags == (OWNED if value is None else {**OWNED, "retention": value}), way


def test_azure_gets_none_without_a_section(azure_server: Server, azurite: Azurite):
    put(azure_server, "untagged", b"1")
    with azurite.client(azure_server.document["azure"]["container"]) as container:
        assert container.get_blob_client("untagged").get_blob_tags() == {}


def local_tags(server: Server) -> dict[str, dict[str, str]]:
    """The tags of each object, as the driver returns them."""
    return {info.key: dict(info.tags) for info in LocalDriver(server.storage_path).list().objects}


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    """A server on local disk."""
    return start_server("local", retention=RULES)


def test_local_disk_keeps_the_tags(server: Server):
    stored = send(server, "mainline/v6.1")
    assert local_tags(server) == {key: {**OWNED, "retention": "2y"} for key in stored.values()}
    put(server, "mainline/v6.1/put", b"again", Authorization=f"Bearer {server.token('other')}")
    assert local_tags(server)["mainline/v6.1/put"] == {OWNER: "other", "retention": "2y"}


def test_a_reload_holds_for_later_uploads(server: Server):
    put(server, "a", b"1")
    server.document["retention"] = {"tag_value": "1d"}
    assert "changed=retention.rules,retention.tag_value new_workers=nothing" in reload(server)
    put(server, "b", b"1")
    assert {key: tags["retention"] for key, tags in local_tags(server).items()} == {"a": "6m", "b": "1d"}


# Deletion from local disk


def run(server: Server, *arguments: str, days: float = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a process whose clock is ahead."""
    return subprocess.run(
        [sys.executable, "-c", _LATER, str(days), *arguments],
        env={**os.environ, "KCI_STORAGE_CONFIG": str(server.config_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture
def filled(server: Server) -> Server:
    """The server, with some objects."""
    for key in ("mainline/v6.1/a", "mainline/v6.12/b", "next/26/c", "next/26/d", "e"):
        put(server, key, key.encode() * 1000)
    stored_by_another_program(server, "by-hand", b"1")
    return server


def test_expired_objects_are_deleted(filled: Server):
    left = set(keys(filled, ""))
    for days, gone in (
        (29, set()),
        (31, {"next/26/c", "next/26/d"}),
        (184, {"e"}),
        (10_000, {"mainline/v6.1/a"}),
    ):
        total = len(left)
        for arguments, there, done in ((["--dry-run"], left, "would be deleted"), ([], left - gone, "deleted")):
            result = run(filled, "expire", *arguments, days=days)
            assert (result.returncode, set(result.stdout.splitlines())) == (0, gone), result.stderr
            assert f"{len(gone)} of {total} objects {done}" in result.stderr
            assert set(keys(filled, "")) == there
        assert all(get(filled, key).status_code == 404 for key in gone)
        left -= gone
    assert left == {"mainline/v6.12/b", "by-hand"}
    assert get(filled, "mainline/v6.12/b").status_code == 200
    wait_until_tidy(filled)


def test_what_was_uploaded_again_meanwhile_stays(filled: Server, monkeypatch: pytest.MonkeyPatch):
    services = build_services(load(filled.config_path, {}))
    now = expire.time.time
    monkeypatch.setattr(expire.time, "time", lambda: now() + 31 * SECONDS_PER_DAY)
    expiry = expire.Expiry(services.driver, services.objects, "retention")
    found = {info.key: info for info in expiry.find()}
    assert set(found) == {"next/26/c", "next/26/d"}
    filled.document["retention"] = {"tag_value": "1y"}
    reload(filled)
    put(filled, "next/26/c", b"newer")
    assert requests.delete(f"{filled.url}/next/26/d", headers=filled.headers(), timeout=SECONDS).status_code == 204
    assert [expiry.delete(info) for info in found.values()] == [None, None]
    assert get(filled, "next/26/c").content == b"newer"


def test_a_key_that_is_being_uploaded_is_reported_and_stays(start_server: Callable[..., Server], tmp_path: Path):
    server = start_server("local", retention={"tag_value": "1d"}, server={"lock_timeout": 0.2})
    put(server, "a", b"1")
    put(server, "b", b"1")
    with Wire(server) as wire:
        wire.send(request("PUT", "/a", {**server.headers(), "Content-Length": 100}), b"begun")
        wait_until(lambda: server.is_writing("a"), SECONDS, "the upload")
        result = run(server, "expire", days=2)
    assert (result.returncode, result.stdout) == (1, "b\n")
    assert "kci-storage: a: another upload of this file" in result.stderr
    assert "1 of 2 objects deleted, 1 B, 1 failed" in result.stderr
    assert get(server, "a").content == b"1"


def test_another_user_is_turned_away(server: Server):
    if os.geteuid():
        pytest.skip("only root can give files away")
    put(server, "a", b"1")
    os.chown(server.storage_path, 65534, 65534)
    try:
        result = run(server, "expire", days=10_000)
    finally:
        os.chown(server.storage_path, 0, 0)
    assert (result.returncode, result.stdout) == (os.EX_CONFIG, "")
    assert "run this as nobody" in result.stderr
    assert keys(server, "") == ["a"]


# Azure's policy


@pytest.fixture
def azure_config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Write a configuration for Azure; returns its path."""

    def write(section: Mapping[str, Any]) -> Path:
        azure = {"account": "kernelci", "key": "c2VjcmV0", "container": "artifacts"}
        path = tmp_path / "config.toml"
        path.write_text(toml({"jwt_secret": "s" * 32, "azure": azure, "retention": section}))
        return path

    return write


def command(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kci_storage.cli", "--config", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_the_policy_has_a_rule_for_each_age(azure_config: Callable[[Mapping[str, Any]], Path]):
    result = command(azure_config({**RULES, "tag_key": "keep"}), "lifecycle-policy")
    assert result.returncode == 0, result.stderr
    rules = json.loads(result.stdout)["rules"]
    assert [rule["name"] for rule in rules] == ["artifacts-30d", "artifacts-6m", "artifacts-2y"]
    assert rules[1] == {
        "enabled": True,
        "name": "artifacts-6m",
        "type": "Lifecycle",
        "definition": {
            "filters": {
                "blobTypes": ["blockBlob"],
                "prefixMatch": ["artifacts/"],
                "blobIndexMatch": [{"name": "keep", "op": "==", "value": "6m"}],
            },
            "actions": {"baseBlob": {"delete": {"daysAfterModificationGreaterThan": 183}}},
        },
    }


def test_each_tag_is_in_the_policy_and_means_the_same(azure_config: Callable[[Mapping[str, Any]], Path]):
    section = load(azure_config(RULES), {}).retention
    rules = lifecycle_policy(section, "artifacts")["rules"]
    found = {rule["definition"]["filters"]["blobIndexMatch"][0]["value"] for rule in rules}
    assert found == {Retention(section).tags(USER, key)["retention"] for key in ("a", "mainline/a", "next/2/a")}


@pytest.mark.parametrize(
    ("driver", "arguments", "says"),
    [
        ("azure", ["lifecycle-policy"], "retention.tag_value: expected an age, here or in a rule"),
        ("local", ["lifecycle-policy"], "for others there is `kci-storage expire`"),
        ("azure", ["expire"], "Azure deletes by itself what `kci-storage lifecycle-policy` says"),
    ],
)
def test_commands_that_make_no_sense_say_so(
    azure_config: Callable[..., Path], driver: str, arguments: list[str], says: str
):
    path = azure_config({})
    path.write_text(path.read_text().replace("jwt_secret", f'driver = "{driver}"\njwt_secret', 1))
    result = command(path, *arguments)
    assert (result.returncode, result.stdout) == (os.EX_CONFIG, "")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
