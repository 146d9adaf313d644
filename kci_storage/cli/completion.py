# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion scripts for shells, generated from the argument parser."""

from __future__ import annotations

import argparse

from kci_storage.client.errors import UsageError

SHELLS = ("bash", "zsh")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for a shell.

    :param parser: the program's parser.
    :param shell: one of :data:`SHELLS`.
    :raises UsageError: the library that generates it is not installed.
    """
    try:
        import shtab
    except ImportError as exc:
        raise UsageError("completion needs the extra: pip install 'kci-storage[client]'") from exc
    return str(shtab.complete(parser, shell=shell))


def with_files(action: argparse.Action) -> argparse.Action:
    """Let the shell complete an argument with names of files."""
    return _completed(action, bash="_shtab_compgen_files", zsh="_files")  # shtab.FILE


def with_folders(action: argparse.Action) -> argparse.Action:
    """Let the shell complete an argument with names of folders."""
    return _completed(action, bash="_shtab_compgen_dirs", zsh="_files -/")  # shtab.DIRECTORY


def _completed(action: argparse.Action, **functions: str) -> argparse.Action:
    action.complete = functions  # type: ignore[attr-defined]  # an attribute of shtab's
    return action
