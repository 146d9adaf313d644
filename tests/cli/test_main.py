# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command ``kci-storage``: contract section 4."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path

import jwt
import pytest
import requests

from kci_storage import __version__
from kci_storage.access import permissions, tokens
from kci_storage.cli import main as cli
from kci_storage.config.settings import User
from kci_storage.errors import Forbidden
from tests.support.harness import toml

SECRET = "a secret that is long enough for HS256"
CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> CommandLine:
    """Runs the command in a new folder, with a configuration or without one."""

    def command(*arguments: str, config: dict | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        if config is not None:
            (tmp_path / "config.toml").write_text(toml(config))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KCI_STORAGE_")}
        return subprocess.run(
            [sys.executable, "-m", "kci_storage.cli", *arguments],
            cwd=tmp_path,
            env={**inherited, **environ},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return command


def local(**more: object) -> dict:
    return {"driver": "local", "jwt_secret": SECRET, **more}


def claims(token: str, secret: str = SECRET) -> dict:
    return jwt.decode(token.strip(), secret, algorithms=["HS256"])


# secret, token


def test_a_secret_is_random_and_strong(run):
    first, second = run("secret"), run("secret")
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout != second.stdout
    secret = first.stdout.removesuffix("\n")
    assert tokens.check_secret(secret) is None and not tokens.is_weak(secret)


def test_a_token_names_its_owner_and_is_valid_for_ever(run):
    result = run("token", "user@example.com", config=local())
    assert (result.returncode, result.stderr) == (0, "")
    assert claims(result.stdout)["email"] == "user@example.com"
    assert "exp" not in claims(result.stdout)


def test_a_token_can_expire(run):
    before = time.time()
    result = run("token", "user@example.com", "--expires", "1.5", config=local())
    assert before - 1 <= claims(result.stdout)["exp"] - 1.5 * 86400 <= time.time()


def test_a_token_is_signed_with_the_secret_that_is_there(run):
    result = run("token", "a@b", config={"driver": "local", "unified_secret": SECRET})
    assert claims(result.stdout)["email"] == "a@b"


def test_the_first_secret_signs(run):
    result = run("token", "a@b", config=local(unified_secret="the other secret, for other services"))
    assert claims(result.stdout)["email"] == "a@b"


@pytest.mark.parametrize("email", ["", " ", "a\nb"])
def test_a_token_without_an_owner_is_refused(run, email):
    result = run("token", email, config=local())
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected an email address" in result.stderr


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf", "1e300", "soon"])
def test_an_impossible_expiry_is_refused(run, days):
    result = run("token", "a@b", f"--expires={days}", config=local())
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected a number of days, more than 0 and at most 36500" in result.stderr


def test_a_token_for_an_unknown_user_comes_with_a_warning(run, tmp_path):
    users = [{"name": "known@example.com", "prefixes": ["/a"]}]
    result = run("token", "unknown@example.com", config=local(users=users))
    assert result.stderr == (
        f"kci-storage: warning: {tmp_path}/config.toml: no [[users]] has the name 'unknown@example.com': "
        "this token may not write anywhere\n"
    )
    assert claims(result.stdout)["email"] == "unknown@example.com"
    with pytest.raises(Forbidden):
        permissions.Permissions([User("known@example.com", ("/a",))]).check("unknown@example.com", "a/x")


# check-config


def test_a_valid_configuration_is_one_line(run, tmp_path):
    result = run("check-config", config=local())
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path}/config.toml: ok (driver local, bind 127.0.0.1:3000)\n"


@pytest.mark.parametrize(("days", "stream"), [(100, "stdout"), (3, "stderr"), (-3, "stderr")])
def test_it_says_when_a_sas_token_ends_and_what_it_does_not_permit(run, tmp_path, days, stream):
    end = datetime.now(UTC) + timedelta(days=days)
    token = f"?sv=2025-01-05&sp=rwdl&se={end:%Y-%m-%dT%H:%M:%SZ}&sr=c&sig=AAAA"
    azure = {"account": "someone", "container": "files", "sastoken": token}
    config = {"driver": "azure", "jwt_secret": "s" * 32, "azure": azure, "retention": {"tag_value": "30d"}}
    result = run("check-config", config=config)
    assert result.returncode == 0
    assert f"the credential for the backend ends at {end:%Y-%m-%d %H:%M} UTC\n" in getattr(result, stream)
    assert "azure.sastoken: has no permission t, so that uploads fail" in result.stderr
    assert "AAAA" not in result.stdout + result.stderr


def test_the_environment_counts(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.toml").write_text(toml(local()))
    result = run("check-config", KCI_STORAGE_CONFIG="other/x.toml", KCI_STORAGE_PORT="4000")
    assert result.stdout == f"{tmp_path}/other/x.toml: ok (driver local, bind 127.0.0.1:4000)\n"


def test_the_option_wins_over_the_environment(run, tmp_path):
    (tmp_path / "x.toml").write_text(toml(local()))
    result = run("--config", "x.toml", "check-config", KCI_STORAGE_CONFIG="nowhere.toml")
    assert result.stdout.startswith(f"{tmp_path}/x.toml: ok")


def test_a_short_secret_works_with_a_warning(run, tmp_path):
    result = run("check-config", config=local(unified_secret="short"))
    assert result.returncode == 0 and ": ok (" in result.stdout
    warning = "unified_secret: shorter than 32 bytes, which can be guessed"
    assert result.stderr == f"kci-storage: warning: {tmp_path}/config.toml: {warning}\n"


@pytest.mark.parametrize("command", [["check-config"], ["serve"], ["token", "a@b"]])
@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "config.toml: no such file; "),
        ({"driver": "local"}, "config.toml: jwt_secret: expected a secret, it is missing; "),
        (local(server={"workers": "two"}), "config.toml: server.workers: expected a whole number from 0 to 1024"),
        (local(driver="lokal"), "config.toml: driver: no driver 'lokal' is installed; did you mean local?"),
        (local(driver="s3"), "config.toml: driver: no driver 's3' is installed; expected one of azure, local"),
        (
            local(unified_secret="ssh-rsa AAAAB3NzaC1yc2E"),
            "config.toml: unified_secret: expected a secret that can sign tokens, but it looks like a public key",
        ),
    ],
)
def test_a_broken_configuration_is_one_line_and_exit_78(run, tmp_path, command, config, problem):
    result = run(*command, config=config)
    assert (result.returncode, result.stdout) == (os.EX_CONFIG, "")
    assert result.stderr.count("\n") == 1
    assert problem in result.stderr and "AAAAB3" not in result.stderr


# Usage


def test_the_version(run):
    assert run("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["token"], ["secret", "--", "--workers=3"]])
def test_wrong_usage_is_exit_2(run, arguments):
    result = run(*arguments, config=local())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: kci-storage")


def test_help_names_every_command(run):
    words = run("--help").stdout.split()
    assert {"serve", "secret", "token", "check-config"} <= set(words)


def test_the_installed_command_is_this_one():
    (point,) = entry_points(group="console_scripts", name="kci-storage")
    assert point.load() is cli.main


# serve


def test_serve_serves(local_server):
    assert requests.get(f"{local_server.url}/v1/health", timeout=60).text == "ok"


def test_a_cache_directory_that_cannot_be_made_is_one_line(run, tmp_path):
    server = {"bind": f"unix:{tmp_path}/socket"}
    done = run("serve", config=local(server=server, cache={"directory": "/dev/null/cache"}))
    assert done.returncode == os.EX_CONFIG
    [said] = done.stderr.splitlines()
    assert said.endswith("not /dev/null/cache: Not a directory")


def test_serve_passes_arguments_on_to_gunicorn(start_server):
    server = start_server("local", server={"workers": 1}, arguments=["--name", "passed-on", "--pid", "gunicorn.pid"])
    assert (server.folder / "gunicorn.pid").read_text() == f"{server.process.pid}\n"
