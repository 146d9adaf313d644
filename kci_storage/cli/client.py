# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's commands on the command line. Their code is imported only when one is run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

from kci_storage.cli import completion
from kci_storage.cli.completion import with_files, with_folders
from kci_storage.client.errors import UsageError
from kci_storage.client.settings import TOKEN_VARIABLE, URL_VARIABLE

# What `ArgumentParser.add_subparsers` returns: argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001  (see above)

MAX_JOBS = 64
EXIT_CODES = "exit codes: 0, all worked; 1, something failed; 2, wrong usage, or no server or token; 130, interrupted"


def add_to(commands: Commands) -> None:
    """Add the client's commands to the program's."""
    _add_upload(commands)
    _add_download(commands)
    _add_ls(commands)
    _add_rm(commands)
    _add_stat(commands)
    shell = commands.add_parser("completion", help="print a completion script for a shell")
    shell.description = 'Print a completion script: eval "$(kci-storage completion bash)"'
    shell.add_argument("shell", choices=completion.SHELLS)
    shell.set_defaults(run=_print_completion)


def run(arguments: argparse.Namespace) -> int:
    """Run a client's command; its exit code."""
    from kci_storage.client import actions

    return actions.run(arguments)


def _print_completion(arguments: argparse.Namespace) -> int:
    try:
        print(completion.script(arguments.parser, arguments.shell))
    except UsageError as exc:
        print(f"kci-storage: {exc}", file=sys.stderr)
        return 2
    return 0


def _add_upload(commands: Commands) -> None:
    command = _command(commands, "upload", "store files, and folders with all that is in them")
    with_files(command.add_argument("files", nargs="+", metavar="FILE", help="a file or a folder"))
    command.add_argument("--to", default="", metavar="PATH", help="the folder to store them in; else the top")
    command.add_argument("--if-absent", action="store_true", help="replace nothing: a file that is there fails")
    _add_token(command)
    _add_jobs(command)
    _add_quiet(command)


def _add_download(commands: Commands) -> None:
    command = _command(commands, "download", "fetch files, resuming what was interrupted")
    command.add_argument("keys", nargs="+", metavar="KEY", help="a file; or a folder, with a slash at its end")
    output = command.add_argument(
        "-o", "--output", type=Path, default=Path("."), metavar="DIR", help="where to; else the working directory"
    )
    with_folders(output)
    command.add_argument("-r", "--recursive", action="store_true", help="each KEY is a folder, slash or not")
    _add_jobs(command)
    _add_quiet(command)


def _add_ls(commands: Commands) -> None:
    command = _command(commands, "ls", "list a folder")
    command.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="the folder; else the top")
    command.add_argument("-r", "--recursive", action="store_true", help="everything below it")


def _add_rm(commands: Commands) -> None:
    command = _command(commands, "rm", "delete files")
    command.add_argument("keys", nargs="+", metavar="KEY")
    command.add_argument("-f", "--force", action="store_true", help="a file that is not there is no failure")
    _add_token(command)
    _add_jobs(command)
    _add_quiet(command)


def _add_stat(commands: Commands) -> None:
    command = _command(commands, "stat", "print what the server says of files")
    command.add_argument("keys", nargs="+", metavar="KEY")


def _command(commands: Commands, name: str, text: str) -> argparse.ArgumentParser:
    """A command with the options that all commands have."""
    command = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
    command.set_defaults(run=run, action=name, quiet=False, jobs=1, token_file=None)
    command.add_argument("--url", metavar="URL", help=f"the server; else ${URL_VARIABLE}")
    command.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    command.add_argument(
        "--retries", type=Number(0, 1000), default=5, metavar="N", help="failures in a row to try again after (5)"
    )
    return command


def _add_token(command: argparse.ArgumentParser) -> None:
    text = f"a file with the token; else ${TOKEN_VARIABLE}, else ~/.config/kci-storage/token"
    with_files(command.add_argument("--token-file", type=Path, metavar="FILE", help=text))


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-j", "--jobs", type=Number(1, MAX_JOBS), default=4, metavar="N", help="how many files at once (4)"
    )


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("-q", "--quiet", action="store_true", help="report failures only")


class Number:
    """An argument's type: a whole number within bounds.

    >>> Number(1, 4)("3")
    3
    """

    def __init__(self, minimum: int, maximum: int):
        self._minimum = minimum
        self._maximum = maximum

    def __call__(self, text: str) -> int:
        if not text.isascii() or not text.isdigit() or not self._minimum <= int(text[:9]) <= self._maximum:
            raise argparse.ArgumentTypeError(f"expected a whole number from {self._minimum} to {self._maximum}")
        return int(text)
