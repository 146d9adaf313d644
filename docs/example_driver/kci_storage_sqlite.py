# SPDX-License-Identifier: LGPL-2.1-or-later
"""An example of a driver: all objects in one SQLite file. It keeps the whole contract and takes five minutes to read.

Configure it with ``driver = "sqlite"`` and ``file`` in ``[sqlite]``: a path, relative to the configuration's folder.

The contract's hard points are easy here, because SQLite has transactions: a commit is one, and so is a read.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from kci_storage.config.settings import Config, ConfigError
from kci_storage.drivers.base import Driver, ObjectInfo, ObjectReader, ObjectWriter, Page
from kci_storage.errors import BackendError, BadRequest, ObjectChanged, ObjectNotFound, PreconditionFailed

PAGE_SIZE = 1000  # objects and folders
PIECE_SIZE = 1024 * 1024  # bytes
BUSY_TIMEOUT = 60  # seconds; writers of any key wait for each other's commits
SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (key BLOB PRIMARY KEY, size, etag, last_modified, content_type, sha256);
CREATE TABLE IF NOT EXISTS pieces (etag TEXT, start INTEGER, data BLOB, PRIMARY KEY (etag, start));
"""


class SqliteDriver(Driver):
    """Keeps each object as a row and its content as further rows.

    :param file: the database; the first upload makes it.
    """

    def __init__(self, file: Path):
        self._file = file

    @classmethod
    def from_config(cls, config: Config) -> SqliteDriver:
        file = config.plugins.get("sqlite", {}).get("file")
        if not isinstance(file, str) or not file:
            raise ConfigError(f"{config.path}: sqlite.file: expected a path")
        return cls(config.path.parent / file)

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        """A new connection, inside a transaction that commits at the block's end, or changes nothing if it raises."""
        with _own_errors():
            connection = sqlite3.connect(
                self._file, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            with contextlib.closing(connection):
                _prepare(connection)
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")  # closing without it rolls back

    def stat(self, key: str) -> ObjectInfo:
        with self.transaction() as connection:
            return _info(connection, key)

    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(self.transaction())
            info = _info(connection, key)
            if etag not in (None, info.etag):
                raise ObjectChanged("the object was replaced")
            return _Reader(info, connection, start, info.size if stop is None else stop, stack.pop_all())

    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        return _Writer(self, key, content_type)

    def delete(self, key: str, expected: str) -> None:
        with self.transaction("BEGIN IMMEDIATE") as connection:
            _check(_info(connection, key).etag, expected)
            connection.execute("DELETE FROM pieces WHERE etag = ?", (expected,))
            connection.execute("DELETE FROM objects WHERE key = ?", (key.encode(),))

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        """There is nothing to do: a transaction is carried out before its call ends, or never."""
        info = self.stat(key)
        _check(info.etag, expected)
        return info

    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        sought = prefix.encode("utf-8", "surrogatepass")
        start = max(sought, _key_of(marker))
        objects: list[ObjectInfo] = []
        folders: list[str] = []
        with self.transaction() as connection:
            while row := connection.execute("SELECT * FROM objects WHERE key >= ? LIMIT 1", (start,)).fetchone():
                if not row[0].startswith(sought):
                    break
                if len(objects) + len(folders) == PAGE_SIZE:
                    return Page(tuple(objects), tuple(folders), start.hex())
                end = row[0].find(delimiter.encode(), len(sought)) if delimiter else -1
                if end < 0:
                    objects.append(ObjectInfo(row[0].decode(), *row[1:]))
                    start = row[0] + b"\0"  # the least key that is greater
                else:
                    folders.append(row[0][: end + 1].decode())
                    start = row[0][:end] + b"0"  # "0" comes after "/": the least key beyond the folder
        return Page(tuple(objects), tuple(folders))

    def probe(self) -> None:
        with self.transaction() as connection:
            connection.execute("SELECT 1 FROM objects LIMIT 1")

    def close(self) -> None:
        """Close nothing: only readers outlive a call, and their users close them."""


class _Reader(ObjectReader):
    """Reads inside one transaction, which sees one version, whatever is committed meanwhile."""

    def __init__(
        self, info: ObjectInfo, connection: sqlite3.Connection, start: int, stop: int, stack: contextlib.ExitStack
    ):
        self.info = info
        self._connection, self._position, self._stop, self._stack = connection, start, stop, stack

    def readinto(self, buffer: memoryview) -> int:
        offset = self._position % PIECE_SIZE
        stop = min(self._stop, self.info.size) - self._position
        if stop <= 0:
            return 0
        with _own_errors():
            query = "SELECT substr(data, ?, ?) FROM pieces WHERE etag = ? AND start = ?"
            wanted = offset + 1, min(stop, len(buffer)), self.info.etag, self._position - offset
            (data,) = self._connection.execute(query, wanted).fetchone()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._stack.close()


class _Writer(ObjectWriter):
    """Spools to a file without a name, of which a crash leaves nothing, and stores it in one transaction."""

    def __init__(self, driver: SqliteDriver, key: str, content_type: str):
        self._driver, self._key, self._content_type = driver, key, content_type
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  (closed when the writer is)

    def write(self, data: bytes | memoryview) -> None:
        with _own_errors():
            self._spool.write(data)

    def flush(self) -> None:
        """Do nothing: no data is held in memory."""

    def commit(self, digests, expected, replay=None) -> ObjectInfo:
        info = ObjectInfo(
            self._key, digests.size, uuid.uuid4().hex, int(time.time()), self._content_type, digests.sha256
        )
        with self._driver.transaction("BEGIN IMMEDIATE") as connection:
            _replace(connection, info, expected)
            self._spool.seek(0)
            for start in range(0, info.size, PIECE_SIZE):
                piece = self._spool.read(PIECE_SIZE)
                connection.execute("INSERT INTO pieces VALUES (?, ?, ?)", (info.etag, start, piece))
        return info

    def abort(self) -> None:
        self._spool.close()


def _replace(connection: sqlite3.Connection, info: ObjectInfo, expected: str | None) -> None:
    """Replace the expected row by the object's.

    :raises PreconditionFailed: the stored version is another one.
    """
    row = connection.execute("SELECT etag FROM objects WHERE key = ?", (info.key.encode(),)).fetchone()
    _check(row[0] if row else None, expected)
    connection.execute("DELETE FROM pieces WHERE etag = ?", row or ("",))
    fields = (info.key.encode(), info.size, info.etag, info.last_modified, info.content_type, info.sha256)
    connection.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", fields)


def _check(present: str | None, expected: str | None) -> None:
    if present != expected:
        raise PreconditionFailed("another version is stored")


def _info(connection: sqlite3.Connection, key: str) -> ObjectInfo:
    row = connection.execute("SELECT * FROM objects WHERE key = ?", (key.encode(),)).fetchone()
    if row is None:
        raise ObjectNotFound("no such file")
    return ObjectInfo(key, *row[1:])


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables, let readers and a writer not wait for each other, and let commits survive a loss of power."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:  # another process has the file open, for which SQLite does not wait here
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
    connection.executescript(SCHEMA)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Turn the system's errors into the contract's; the log gets the reason, the client does not."""
    try:
        yield
    except (sqlite3.Error, OSError) as exc:
        raise BackendError("the database failed", detail=str(exc)) from exc


def _key_of(marker: str | None) -> bytes:
    """The key at which a page begins; markers come from clients, who may send anything."""
    try:
        return bytes.fromhex(marker or "")
    except ValueError as exc:
        raise BadRequest("no such page") from exc
