# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command ``kci-storage``.

Exit codes: 0, done; 1, ``health`` found no server; 2, wrong usage; 78 (``EX_CONFIG`` of sysexits.h), the
configuration cannot be used. A service manager can be told not to restart the server after 78 (systemd:
``RestartPreventExitStatus=78``). The client's commands (:mod:`kci_storage.cli.client`) also exit with 1, something
failed, and 130, interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

from kci_storage import __version__, drivers
from kci_storage.access import tokens
from kci_storage.cli import client, health, retention
from kci_storage.config.reading import CONFIG_VARIABLE, load
from kci_storage.config.settings import Config, ConfigError
from kci_storage.drivers.base import Advising
from kci_storage.server import preflight

GUNICORN = ("gunicorn", "-c", "python:kci_storage.server.hooks", "kci_storage.app:create_app()")
MAX_DAYS = 36_500
WARN_SECONDS = 14 * 86_400.0  # before the end of a credential


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code.

    :param argv: the arguments without the program's name; None: the process's own.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given and "serve" in given[: given.index("--")] else len(given)
    parser = _parser()
    arguments = parser.parse_args(given[:split])
    arguments.passed_on = given[split + 1 :]
    arguments.parser = parser
    if arguments.passed_on and arguments.run is not serve:
        parser.error("only serve passes arguments on to gunicorn")
    try:
        return arguments.run(arguments) or 0
    except ConfigError as exc:
        print(f"kci-storage: {exc}", file=sys.stderr)
        return os.EX_CONFIG


def serve(arguments: argparse.Namespace) -> NoReturn:
    """Become gunicorn, which reads the same configuration again in :mod:`kci_storage.server.hooks`."""
    config = preflight.usable(arguments.config)
    os.environ[CONFIG_VARIABLE] = str(config.path)
    # At SIGUSR2 gunicorn starts anew as a script in its own folder, whose `http` would hide Python's.
    os.environ["PYTHONSAFEPATH"] = "1"
    name, *options, application = GUNICORN
    os.execv(sys.executable, [sys.executable, "-m", name, *options, *arguments.passed_on, application])


def secret(arguments: argparse.Namespace) -> None:
    """Print a new random secret."""
    print(tokens.new_secret())


def token(arguments: argparse.Namespace) -> None:
    """Print a token for ``email``, signed with the first configured secret."""
    config = preflight.usable(arguments.config)
    if config.users and all(user.name != arguments.email for user in config.users):
        _warn(f"{config.path}: no [[users]] has the name {arguments.email!r}: this token may not write anywhere")
    print(tokens.issue(arguments.email, config.secrets[0], arguments.expires))


def check_config(arguments: argparse.Namespace) -> None:
    """Say that the configuration is valid, or fail."""
    config = preflight.usable(arguments.config)
    for name in ("jwt_secret", "unified_secret"):
        if (value := getattr(config, name)) and tokens.is_weak(value):
            _warn(f"{config.path}: {name}: shorter than {tokens.MIN_SECRET_BYTES} bytes, which can be guessed")
    _tell_about_driver(config)
    print(f"{config.path}: ok (driver {config.driver}, bind {config.server.bind})")


def _tell_about_driver(config: Config) -> None:
    """Print what the driver tells from its settings, if it does."""
    kind = drivers.load(config.driver)
    driver = kind.from_config(config) if issubclass(kind, Advising) else None
    if not isinstance(driver, Advising):
        return
    for line in driver.advice():
        _warn(f"{config.path}: {line}")
    if (end := driver.credential_end()) is not None:
        when = f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC"
        text = f"{config.path}: the credential for the backend ends at {when}"
        print(text) if end > time.time() + WARN_SECONDS else _warn(text)


def ask_health(arguments: argparse.Namespace) -> int:
    """Say that the server of this configuration answers, or fail."""
    try:
        health.ask(load(arguments.config).server)
    except health.Unhealthy as exc:
        print(f"kci-storage: {exc}", file=sys.stderr)
        return 1
    print("ok")
    return 0


def _warn(message: str) -> None:
    print(f"kci-storage: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kci-storage", description="The file storage server of KernelCI.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"the configuration; else ${CONFIG_VARIABLE}, else ./config.toml"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "serve", serve, "start the server; what follows -- goes to gunicorn")
    _command(commands, "secret", secret, "print a new random secret")
    issuing = _command(commands, "token", token, "print a token, signed with the configured secret")
    issuing.add_argument("email", type=_email, help="the claim that names its owner")
    issuing.add_argument("--expires", type=_days, metavar="DAYS", help="how long it is valid; else for ever")
    _command(commands, "check-config", check_config, "say whether the configuration is valid")
    _command(commands, "health", ask_health, "say whether the server of the configuration answers")
    retention.add_to(partial(_command, commands))
    client.add_to(commands)
    return parser


def _command(commands: client.Commands, name: str, run: Callable[..., object], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _email(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError("expected an email address")
    return text


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= MAX_DAYS:
        raise argparse.ArgumentTypeError(f"expected a number of days, more than 0 and at most {MAX_DAYS}")
    return days


if __name__ == "__main__":
    sys.exit(main())
