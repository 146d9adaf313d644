# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's commands, from the parsed arguments to the exit code."""

from __future__ import annotations

import argparse
import calendar
import contextlib
import email.utils
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from kci_storage.client import paths, settings
from kci_storage.client.downloads import download
from kci_storage.client.errors import ClientError, ServerRefused, UsageError
from kci_storage.client.progress import Progress, progress
from kci_storage.client.retries import Attempts
from kci_storage.client.storage import Level, Properties, Storage, printable
from kci_storage.client.transfers import at_once
from kci_storage.client.uploads import upload
from kci_storage.http.sizes import readable_size

T = TypeVar("T")
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes


@dataclass(frozen=True)
class Result:
    """The outcome for one file; the fields are those of a line with ``--json``."""

    action: str
    key: str
    result: str  # uploaded, downloaded, unchanged, deleted, absent, or failed
    file: str | None = None  # the local one
    size: int | None = None  # bytes
    sha256: str | None = None
    etag: str | None = None
    url: str | None = None
    status: int | None = None  # of the server's answer, if it was an error
    error: str | None = None


class Session:
    """One run of a command."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        writes = arguments.action in ("upload", "rm")
        self.storage = Storage(
            settings.server_url(arguments.url), settings.token(arguments.token_file) if writes else None
        )
        transfers = arguments.action in ("upload", "download")
        self.progress = progress(arguments.quiet) if transfers else Progress(arguments.quiet)

    def attempts(self, subject: str) -> Attempts:
        """The attempts at an operation, whose retries are reported.

        :param subject: the file or folder that the messages name.
        """
        return Attempts(self.arguments.retries, lambda text: self.progress.note(f"{subject or '/'}: {text}"))

    def each(self, action: str, tasks: Sequence[tuple[str, str | None, Callable[[], Result]]]) -> int:
        """Run tasks for several files concurrently, and report the outcome of each; the exit code.

        :param tasks: for each file: its key, the local file, and the function to call.
        """
        guarded = [functools.partial(_guarded, action, *task) for task in tasks]
        failed = 0
        try:
            for result in at_once(guarded, self.arguments.jobs):
                failed += result.result == "failed"
                self.report(result)
        finally:
            self.progress.close()
        if failed and len(tasks) > 1:
            self.progress.failure(f"{failed} of {len(tasks)} failed")
        return FAILED if failed else DONE

    def report(self, result: Result) -> None:
        """Print the outcome for a file."""
        if result.error is not None:
            self.progress.failure(f"{result.file if result.action == 'upload' else result.key}: {result.error}")
        if self.arguments.json:
            self.progress.line(json.dumps({k: v for k, v in asdict(result).items() if v is not None}))
        elif result.error is None and not self.arguments.quiet:
            self.progress.line(printable(_sentence(result)))


def run(arguments: argparse.Namespace) -> int:
    """Run a command; its exit code."""
    try:
        return _ACTIONS[arguments.action](Session(arguments))
    except ClientError as exc:
        print(f"kci-storage: {printable(str(exc))}", file=sys.stderr)
        return USAGE if isinstance(exc, UsageError) else FAILED
    except KeyboardInterrupt:
        kept = "; what has come is kept: run it again to have the rest" if arguments.action == "download" else ""
        print(f"kci-storage: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as head, has closed the pipe
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        return FAILED


def _guarded(action: str, key: str, file: str | None, task: Callable[[], Result]) -> Result:
    """The task's result; an expected exception becomes a failed result."""
    try:
        return task()
    except ClientError as exc:
        return Result(action, key, "failed", file, status=exc.status, error=str(exc))
    except OSError as exc:
        return Result(action, key, "failed", file, error=exc.strerror or str(exc))


def _sentence(result: Result) -> str:
    size = "" if result.size is None else f"  {readable_size(result.size)}"
    if result.action == "upload":
        return f"{result.file} -> {result.key}{size}"
    if result.action == "download":
        return f"{result.key} -> {result.file}{size}" + ("  (unchanged)" if result.result == "unchanged" else "")
    return f"{result.key}: {result.result}"


# Files


def _upload(session: Session) -> int:
    arguments = session.arguments
    files = paths.files_to_upload(arguments.files, arguments.to, session.progress.note)
    for file in files:
        session.progress.expect(_size(file.path))

    def one(file: paths.LocalFile) -> Result:
        stored = upload(session.storage, file, session.attempts(file.path), session.progress, arguments.if_absent)
        return _result("upload", "uploaded", session.storage, stored, file.path)

    return session.each("upload", [(file.key, file.path, functools.partial(one, file)) for file in files])


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # the upload itself will report the error


def _download(session: Session) -> int:
    arguments = session.arguments
    targets = paths.without_conflicts(
        each for key in arguments.keys for each in _targets(session, key, arguments.output, arguments.recursive)
    )
    session.progress.expect(sum(each.size for each in targets))

    def one(target: paths.Target) -> Result:
        properties, fetched = download(session.storage, target, session.attempts(target.key), session.progress)
        return _result(
            "download", "downloaded" if fetched else "unchanged", session.storage, properties, str(target.path)
        )

    return session.each(
        "download",
        [(each.key, str(each.path) if each.path else None, functools.partial(one, each)) for each in targets],
    )


def _targets(session: Session, key: str, folder: Path, recursive: bool) -> Iterator[paths.Target]:
    """The files to download for a key, or for a folder's name."""
    name = key.strip("/")
    if recursive or key.endswith("/"):
        yield from _targets_below(session, name, folder)
    else:
        yield paths.target(folder, key.removeprefix("/"), name.rpartition("/")[2])


def _targets_below(session: Session, name: str, folder: Path) -> Iterator[paths.Target]:
    prefix = f"{name}/" if name else ""
    above = len(name.rpartition("/")[0]) + 1 if "/" in name else 0
    try:
        listed = session.attempts(prefix).run(lambda: list(session.storage.list(prefix)))
        if not listed:
            raise ClientError("no such folder, or it is empty")
    except ClientError as exc:
        yield paths.Target(prefix, None, problem=str(exc))
        return
    for file in listed:
        if file.key.startswith(prefix):
            yield paths.target(folder, file.key, file.key[above:], file.size)
        else:
            yield paths.Target(file.key, None, problem="the server lists it in a folder where it is not")


def _rm(session: Session) -> int:
    def one(key: str) -> Result:
        return Result("rm", key, _delete(session, key))

    keys = [key.removeprefix("/") for key in dict.fromkeys(session.arguments.keys)]
    return session.each("rm", [(key, None, functools.partial(one, key)) for key in keys])


def _delete(session: Session, key: str) -> str:
    """Delete a file; the outcome, as of :class:`Result`."""
    attempts, doubtful = session.attempts(key), False
    while True:
        try:
            session.storage.delete(key)
            return "deleted"
        except ClientError as exc:
            if exc.status == 404 and (doubtful or session.arguments.force):
                return "deleted" if doubtful else "absent"
            doubtful = doubtful or exc.status is None or exc.status >= 500
            attempts.failed(exc)


def _result(action: str, outcome: str, storage: Storage, properties: Properties, file: str) -> Result:
    return Result(
        action, properties.key, outcome, file, properties.size, properties.sha256, properties.etag,
        storage.url_of(properties.key),
    )  # fmt: skip


# Listing


def _stat(session: Session) -> int:
    code = DONE
    for key in session.arguments.keys:
        key = key.removeprefix("/")
        try:
            properties = session.attempts(key).run(functools.partial(session.storage.properties, key))
            _print_properties(properties, session)
        except ClientError as exc:
            session.report(Result("stat", key, "failed", status=exc.status, error=str(exc)))
            code = FAILED
    return code


def _print_properties(properties: Properties, session: Session) -> None:
    fields = {**asdict(properties), "url": session.storage.url_of(properties.key)}
    if session.arguments.json:
        session.progress.line(json.dumps(fields))
        return
    for name, value in fields.items():
        shown = f"{value} ({readable_size(value)})" if name == "size" and value >= 1024 else value
        session.progress.line(printable(f"{name.replace('_', ' '):14} {'unknown' if shown is None else shown}"))


def _ls(session: Session) -> int:
    name = session.arguments.prefix.strip("/")
    lines = _everything(session, name) if session.arguments.recursive else _level(session, name)
    found = False
    for fields in lines:
        found = True
        session.progress.line(json.dumps(fields) if session.arguments.json else _row(fields))
    if not found and name:
        raise ClientError(f"{name}: no such file or folder")
    return DONE


def _everything(session: Session, name: str) -> Iterator[dict[str, Any]]:
    """The file of that name, and all files in the folder of that name."""
    for file in session.attempts(name).run(lambda: _begun(session.storage.list(name))):
        if not name or file.key == name or file.key.startswith(f"{name}/"):
            yield _listed(file)


def _begun(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which the first has been fetched, so that a failure at the beginning can be retried."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def _level(session: Session, name: str) -> Iterator[dict[str, Any]]:
    """The entries directly in the folder of that name; or the file, if the name is that of a file."""
    attempts, prefix = session.attempts(name), f"{name}/" if name else ""
    try:
        level, following = attempts.run(lambda: session.storage.level(prefix))
    except ServerRefused as exc:
        if exc.status != 404:
            raise
        yield from _file(session, name)
        return
    yield from _entries(level)
    while following is not None:
        level, following = attempts.run(functools.partial(session.storage.next_page, following))
        yield from _entries(level)


def _entries(level: Level) -> Iterator[dict[str, Any]]:
    yield from ({"path": folder, "type": "folder"} for folder in level.folders)
    yield from map(_listed, level.files)


def _file(session: Session, name: str) -> Iterable[dict[str, Any]]:
    try:
        return [_listed(session.attempts(name).run(lambda: session.storage.properties(name)))] if name else []
    except ServerRefused as exc:
        if exc.status != 404:
            raise
        return []


def _listed(file: Properties) -> dict[str, Any]:
    return {
        "path": file.key, "type": "file", "size": file.size, "etag": file.etag, "last_modified": file.last_modified,
    }  # fmt: skip


def _row(fields: dict[str, Any]) -> str:
    if fields["type"] == "folder":
        return printable(f"{'-':>10}  {'':16}  {fields['path']}")
    return printable(f"{readable_size(fields['size']):>10}  {_date(fields['last_modified']):16}  {fields['path']}")


def _date(http_date: str | None) -> str:
    """A date to the minute, UTC; empty: it is not valid.

    >>> _date("Wed, 21 Oct 2015 07:28:00 GMT"), _date("today")
    ('2015-10-21 07:28', '')
    """
    parsed = email.utils.parsedate(http_date or "")
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(calendar.timegm(parsed))) if parsed else ""


_ACTIONS: dict[str, Callable[[Session], int]] = {
    "upload": _upload, "download": _download, "rm": _rm, "stat": _stat, "ls": _ls,
}  # fmt: skip
