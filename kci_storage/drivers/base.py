"""The driver contract: what a storage backend must be able to do.

A driver is found by its name through the entry point group ``kci_storage.drivers`` and made once per worker
process, after the fork. All its methods may be called by many threads at once.

Keys are valid by :mod:`kci_storage.keys` before they get here. Sizes and offsets are bytes; times are seconds since
the epoch; ETags are opaque and bare, without quotes.

Errors are those of :mod:`kci_storage.errors`; an SDK's or the system's own never leave a driver. Only the backend's
own word that an object is missing is :class:`~kci_storage.errors.ObjectNotFound`; a time-out is
:class:`~kci_storage.errors.BackendTimeout`, throttling is :class:`~kci_storage.errors.BackendThrottled`, anything
else of the backend is :class:`~kci_storage.errors.BackendError`.

``tests/drivers/contract.py`` says the same in tests; a new driver inherits them in a few lines.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from kci_storage.config.settings import Config

PIECE_SIZE = 256 * 1024  # bytes that who iterates over a reader gets at a time, at most


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The properties of one version of an object."""

    key: str
    size: int  # bytes
    etag: str  # opaque, strong, without quotes; another version has another one
    last_modified: int  # seconds since the epoch
    content_type: str | None = None  # None: the backend knows none
    sha256: str | None = None  # hex, of the whole content; None: the backend knows none
    md5: bytes | None = None  # 16 bytes, of the whole content; None: the backend knows none
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)  # empty, too, where they must be asked for

    def to_fields(self) -> dict[str, Any]:
        """The properties as plain values that JSON can hold."""
        return {**asdict(self), "md5": self.md5.hex() if self.md5 else None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ObjectInfo:
        """The reverse of :meth:`to_fields`.

        :raises ValueError: they are not such fields.
        """
        try:
            return cls(**{**fields, "md5": bytes.fromhex(fields["md5"]) if fields["md5"] else None})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"not an object's properties: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, in the backend's order."""

    objects: tuple[ObjectInfo, ...]
    folders: tuple[str, ...] = ()  # with a delimiter: the common prefixes, ending in it
    next_marker: str | None = None  # what gets the next page; None: this was the last one


@dataclass(frozen=True, slots=True)
class Digests:
    """What the server computed over an upload while it passed."""

    size: int  # bytes
    sha256: str  # hex
    md5: bytes | None = None  # None: the driver did not ask for it


class Expectation(enum.Enum):
    """What must be stored under a key at the moment of a commit, where it is no certain version."""

    ANYTHING = enum.auto()
    NOTHING = enum.auto()


class ObjectReader(ABC):
    """The content of one version, or a range of it, as it arrives. Closing it early gives the rest up."""

    info: ObjectInfo  # of the whole object, whatever the range

    @abstractmethod
    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes at the beginning of ``buffer``, as many as come without much waiting.

        Never silently short: it raises when the backend ends early.

        :param buffer: not empty, writable, of bytes.
        :returns: how many; 0: that was all.
        :raises BackendError: the backend failed; what was given so far is right.
        """

    def __iter__(self) -> Iterator[bytes]:
        """The bytes in order, in pieces of at most :data:`PIECE_SIZE`."""
        buffer = memoryview(bytearray(min(PIECE_SIZE, max(self.info.size, 1))))
        while size := self.readinto(buffer):
            yield bytes(buffer[:size])

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection. Idempotent."""

    def __enter__(self) -> ObjectReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ObjectWriter(ABC):
    """A new version of an object on its way in: visible to nobody before :meth:`commit` returns.

    Used as a context manager, it is aborted at the end of the block unless it was committed.
    """

    @property
    def held(self) -> int:
        """Bytes that it keeps in memory until the commit, however long that takes."""
        return 0

    @abstractmethod
    def flush(self) -> None:
        """Hand to the backend what is held in memory, even if that makes the commit cost more.

        :raises BackendError: the backend failed. The writer is then of no more use.
        """

    @abstractmethod
    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, of any size; it is the caller's again afterwards, to be overwritten.

        It may return before the backend has it, and blocks when too much waits.

        :raises BackendError: the backend failed, maybe on an earlier piece. The writer is then of no more use.
        :raises InsufficientStorage: this server's disk is full, and the driver stores there.
        """

    @abstractmethod
    def commit(
        self,
        digests: Digests,
        expected: str | Expectation = Expectation.ANYTHING,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        """Make what was written the object's content, at once and durably, replacing the previous version.

        :param digests: of all that was written; stored with the object where the backend can.
        :param expected: the ETag of the version that must be there now, or an :class:`Expectation`.
        :param replay: gives the whole content again, for a driver that must send it once more.
        :raises PreconditionFailed: something else than ``expected`` is there; nothing has changed, and commit may
            be called again with another expectation.
        :raises KeyConflict: the backend cannot hold this key beside one that it has.
        :raises WriteConflict: another machine's writer came in between.
        :raises BackendError: it failed, or nobody knows whether it did (a time-out); or ``digests`` are of another
            size than what was written, and nothing has changed.
        """

    @abstractmethod
    def abort(self) -> None:
        """Throw away what was written. Idempotent, nothing after a commit, and it never raises."""

    def __enter__(self) -> ObjectWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abort()


class Driver(ABC):
    """A storage backend."""

    wants_md5 = False  # whether Digests.md5 is to be computed for commits

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config) -> Driver:
        """A driver made from the configuration. It may check its settings, but asks the backend nothing.

        :raises ConfigError: a setting is missing or impossible.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """The object's properties.

        :raises ObjectNotFound: there is none.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        """Bytes ``start`` up to, not including, ``stop`` (None, or beyond the end: the end) of one version.

        A ``start`` at or beyond the end, or at ``stop``, gives no bytes; it is no error.

        The backend has answered when this returns: the reader's ``info`` is known. Every later request that the
        reader makes is pinned to that version.

        :param etag: the only version wanted; None: the present one.
        :raises ObjectNotFound: there is no such object.
        :raises ObjectChanged: the present version is not ``etag``.
        """

    @abstractmethod
    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        """Begin a new version. It asks the backend nothing yet.

        :param tags: stored with the object, in the request that commits it, for what tidies up the backend (who owns
            the object, how long it is kept). Names and values are ASCII letters, digits, blanks and ``+-./:=_``.
        :raises InsufficientStorage: this server's disk is full, and the driver stores there.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete the object; a read that has begun may end or fail, but never mixes versions.

        :raises ObjectNotFound: there is none.
        """

    @abstractmethod
    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        """One page of the objects whose key starts with ``prefix``, as plain text.

        What the driver keeps for itself, and keys under ``.kci/``, are not shown. A page may be empty and yet have
        a successor. An object that is there all the while is listed exactly once over all pages.

        :param delimiter: ``"/"`` to get one level: keys with a further delimiter are given once, as a folder.
        :param marker: the previous page's ``next_marker``; another string gives a page or raises BadRequest.
        :param details: False: only keys are asked for, which can be far cheaper; sizes and ETags may be made up.
        """

    @abstractmethod
    def probe(self) -> None:
        """Ask the backend the cheapest question that shows it can serve.

        :raises BackendError: it cannot.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of connections and threads. Idempotent."""


@runtime_checkable
class LocalObjects(Protocol):
    """Optional ability: objects are files on this machine, and are served from where they lie, without a cache."""

    def open(self, key: str) -> tuple[ObjectInfo, int]:
        """The object's properties and a descriptor of its content, of one and the same version.

        The caller closes the descriptor.

        :raises ObjectNotFound: there is none.
        """


@runtime_checkable
class Sweepable(Protocol):
    """Optional ability: a crash may leave files behind, and the driver can tell them from those in use."""

    def sweep(self) -> int:
        """Remove what writers that died have left; safe while others write.

        :returns: how many files were removed.
        """
