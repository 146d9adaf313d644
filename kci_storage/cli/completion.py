# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion for shells, made from the commands' own description."""

from __future__ import annotations

import argparse

from kci_storage.client.errors import UsageError

SHELLS = ("bash", "zsh")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell is to read.

    :param parser: of the whole program.
    :raises UsageError: the library that makes it is not installed.
    """
    try:
        import shtab
    except ImportError as exc:
        raise UsageError("completion needs the extra: pip install 'kci-storage[client]'") from exc
    return str(shtab.complete(parser, shell=shell))


def with_files(action: argparse.Action) -> argparse.Action:
    """Have an argument completed with the names of files."""
    return _completed(action, bash="_shtab_compgen_files", zsh="_files")  # shtab.FILE


def with_folders(action: argparse.Action) -> argparse.Action:
    """Have an argument completed with the names of folders."""
    return _completed(action, bash="_shtab_compgen_dirs", zsh="_files -/")  # shtab.DIRECTORY


def _completed(action: argparse.Action, **functions: str) -> argparse.Action:
    action.complete = functions  # type: ignore[attr-defined]  # an attribute of shtab's
    return action
