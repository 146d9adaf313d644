# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver contract: what a storage backend must be able to do.

A driver is found by its name through the entry point group ``kci_storage.drivers`` and made once per worker
process, after the fork. All its methods may be called by many threads at once.

A guard (:mod:`kci_storage.drivers.guard`) is around every driver. It asks for keys that are valid by
:mod:`kci_storage.keys`, hides others that a listing has, and commits nothing but the whole content.

Sizes and offsets are bytes; times are seconds since the epoch; ETags are opaque and bare, without quotes.

Errors are those of :mod:`kci_storage.errors`; an SDK's or the system's own never leave a driver. Only the backend's
own word that an object is missing is :class:`~kci_storage.errors.ObjectNotFound`; a time-out is
:class:`~kci_storage.errors.BackendTimeout`, throttling is :class:`~kci_storage.errors.BackendThrottled`, anything
else of the backend is :class:`~kci_storage.errors.BackendError`.

There are no unconditional changes. A commit or deletion names the version that it replaces, and each of its retries
does so too: so a request whose answer was lost, and that the backend carries out later, never lands over another
change that was acknowledged meanwhile. If a driver cannot tell whether a change was carried out or still may be, it
raises :class:`~kci_storage.errors.OutcomeUnknown`; any other error says that nothing has changed, nor will. See
docs/consistency.md.

``tests/drivers/contract.py`` says the same in tests; a new driver inherits them in a few lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, Self, runtime_checkable

from kci_storage.config.settings import Config

PIECE_SIZE = 256 * 1024  # bytes, at most, that iterating over a reader gives at a time


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
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)  # also empty if they would cost another request
    content_encoding: str | None = None  # of the stored content, by another program's word; sent along with it
    claimed_digest: tuple[str, str] | None = None  # hashlib's name and hex; another program's word, maybe wrong

    def to_fields(self) -> dict[str, Any]:
        """The properties as plain values that JSON can hold."""
        return {**asdict(self), "md5": self.md5.hex() if self.md5 else None}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> ObjectInfo:
        """The reverse of :meth:`to_fields`. Fields that a later version has added are passed over.

        :raises ValueError: these are not such fields.
        """
        known = {name: value for name, value in values.items() if name in _FIELDS}
        try:
            claimed = known.get("claimed_digest")
            known |= {
                "md5": bytes.fromhex(known["md5"]) if known["md5"] else None,
                "claimed_digest": (claimed[0], claimed[1]) if claimed else None,
            }
            return cls(**known)
        except (TypeError, KeyError, IndexError) as exc:
            raise ValueError(f"not an object's properties: {exc}") from exc


_FIELDS = {each.name for each in fields(ObjectInfo)}


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, in the backend's order."""

    objects: tuple[ObjectInfo, ...]
    folders: tuple[str, ...] = ()  # with a delimiter: the common prefixes, ending in it
    next_marker: str | None = None  # gets the next page; None: this is the last one


@dataclass(frozen=True, slots=True)
class Digests:
    """What the server computes over an upload while it arrives."""

    size: int  # bytes
    sha256: str  # hex
    md5: bytes | None = None  # None: the driver does not want it


class ObjectReader(ABC):
    """The content of one version, or a range of it, as it arrives. Closing it early abandons the rest."""

    info: ObjectInfo  # of the whole object, whatever the range

    @abstractmethod
    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes at the beginning of ``buffer``, as many as come without much waiting.

        Never silently short: it raises when the backend ends early.

        :param buffer: not empty, writable, of bytes.
        :returns: how many; 0: that was all.
        :raises BackendError: the backend failed; the bytes given so far are right.
        """

    def __iter__(self) -> Iterator[bytes]:
        """The bytes in order, in pieces of at most :data:`PIECE_SIZE`."""
        buffer = memoryview(bytearray(min(PIECE_SIZE, max(self.info.size, 1))))
        while size := self.readinto(buffer):
            yield bytes(buffer[:size])

    @abstractmethod
    def close(self) -> None:
        """Release the connection. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ObjectWriter(ABC):
    """A new version of an object while it is uploaded: visible to nobody before :meth:`commit`.

    As a context manager, it is aborted at the end of the block unless it was committed.
    """

    @property
    def held(self) -> int:
        """Bytes that it keeps in memory while it waits for more data."""
        return 0

    @abstractmethod
    def flush(self) -> None:
        """Send the bytes in memory to the backend, even if that makes the commit cost more.

        :raises BackendError: the backend failed. The writer cannot be used any more.
        """

    @abstractmethod
    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``, of any size. The caller may overwrite its buffer afterwards.

        It may return before the backend has the data, and blocks while too much of it is waiting.

        :raises BackendError: the backend failed, maybe on an earlier piece. The writer cannot be used any more.
        :raises InsufficientStorage: this server's disk is full, and the driver stores there.
        """

    @abstractmethod
    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        """Make the written data the object's content, atomically and durably, replacing the previous version.

        :param digests: of all the data, whose size is right; stored with the object where the backend can.
        :param expected: the ETag of the version that must be there now; None: there must be no object.
        :param replay: gives the whole content again, for a driver that must send it once more.
        :raises PreconditionFailed: another version than ``expected`` is there, or none. Commit may be called again
            with another expectation.
        :raises KeyConflict: the backend cannot hold this key beside one that it has.
        :raises WriteConflict: another machine's writer came in between.
        :raises OutcomeUnknown: the backend may have committed the data, or still may. That it has found another
            version than ``expected`` after an answer was lost is no proof: the data may have been there meanwhile.
        :raises BackendError: it failed.
        """

    @abstractmethod
    def abort(self) -> None:
        """Discard the data. Idempotent; does nothing after a commit; never raises."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abort()


class Driver(ABC):
    """A storage backend."""

    wants_md5 = False  # whether Digests.md5 is to be computed for commits

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config) -> Driver:
        """A driver made from the configuration. It may check its settings, but does not contact the backend.

        :raises ConfigError: a setting is missing or impossible.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """The object's properties.

        :raises ObjectNotFound: there is none.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> ObjectReader:
        """Read bytes ``start`` up to, not including, ``stop`` (None, or beyond the end: the end) of one version.

        A ``start`` at or beyond the end, or at ``stop``, gives no bytes; it is not an error.

        The backend has answered when this returns, so the reader's ``info`` is known. All later requests of the
        reader are pinned to that version.

        :param etag: the only version wanted; None: the current one.
        :raises ObjectNotFound: there is no such object.
        :raises ObjectChanged: the current version is not ``etag``.
        """

    @abstractmethod
    def writer(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> ObjectWriter:
        """Begin a new version, without contacting the backend yet.

        :param tags: stored with the object, in the request that commits it: its owner, how long it is kept. Names
            and values are ASCII letters, digits, blanks and ``+-./:=_``.
        :raises InsufficientStorage: this server's disk is full, and the driver stores there.
        """

    @abstractmethod
    def delete(self, key: str, expected: str) -> None:
        """Delete the object. A read that has begun may complete or fail, but never mixes versions.

        :param expected: the ETag of the version that must be there now.
        :raises ObjectNotFound: there is none.
        :raises PreconditionFailed: another version is there; or there is none, if the backend does not tell.
        :raises OutcomeUnknown: the backend may have deleted it, or still may.
        """

    def fence(self, key: str, expected: str) -> ObjectInfo | None:
        """Keep every earlier change whose answer was lost from being carried out any more.

        Such a change names the version that it replaces. So it is enough to give the present version another ETag.
        Its content and type stay.

        :param expected: the ETag of the version that must be there now.
        :returns: the version with its new ETag; None: the backend cannot do this.
        :raises ObjectNotFound: there is none.
        :raises PreconditionFailed: another version is there.
        :raises BackendError: it failed.
        """
        return None

    @abstractmethod
    def list(self, prefix: str = "", delimiter: str = "", marker: str | None = None, details: bool = True) -> Page:
        """One page of the objects whose key starts with ``prefix``, as plain text.

        The driver's own files are not listed. A page may be empty and yet have a successor. An object that is there
        all the time is listed exactly once over all pages.

        :param delimiter: ``"/"`` to get one level: keys with a further delimiter are given once, as a folder.
        :param marker: the previous page's ``next_marker``; any other string gives a page or raises BadRequest.
        :param details: False: only keys are wanted, which can be far cheaper; sizes and ETags may be made up.
        """

    @abstractmethod
    def probe(self) -> None:
        """Make the cheapest request that shows that the backend can serve.

        :raises BackendError: it cannot.
        """

    @abstractmethod
    def close(self) -> None:
        """Release connections and threads. Idempotent."""


@runtime_checkable
class LocalObjects(Protocol):
    """Optional ability: objects are files on this machine, and are served directly, without a cache."""

    def open(self, key: str) -> tuple[ObjectInfo, int]:
        """The object's properties and a descriptor of its content, both of the same version.

        The caller closes the descriptor.

        :raises ObjectNotFound: there is none.
        """


@runtime_checkable
class Advising(Protocol):
    """Optional ability: it can tell from its settings, without the backend, what will fail now or later."""

    def advice(self) -> list[str]:
        """What will fail, one line for each, for an administrator."""

    def credential_end(self) -> float | None:
        """When the backend will refuse the credential, in seconds since the epoch; None: never, or unknown."""


@runtime_checkable
class Sweepable(Protocol):
    """Optional ability: a crash may leave files behind, and the driver can tell them from files in use.

    Both methods are safe while others write. They return how many files were removed.
    """

    def recover(self) -> int:
        """Remove what dead writers left, as far as that is quickly found: each worker waits for it when it starts."""

    def sweep(self) -> int:
        """Remove all that crashes left, which may take minutes. It is called once a day, and after a worker's end."""
