# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploads: one pass from the client through the digests to the driver and, as a copy, to the cache.

No more of a file is in memory than the pieces in hand, and nothing is committed before the whole body was received.
The driver commits first, then the cache: an upload that was answered with success is in both, and an upload that was
interrupted anywhere is in neither.

Each commit names the version that it replaces, also if the client does not care which one that is: so an upload whose
answer was lost never replaces a later one (docs/consistency.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kci_storage.cache.directory import Cache
from kci_storage.drivers.base import Digests, Driver, LocalObjects, ObjectInfo
from kci_storage.errors import (
    DigestMismatch,
    InsufficientStorage,
    ObjectNotFound,
    PreconditionFailed,
    WriteConflict,
)
from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.http.multipart import READ_SIZE, Body, too_large
from kci_storage.store.changing import changing
from kci_storage.store.digests import RunningDigests
from kci_storage.store.negative_cache import NegativeCache

COMMITS = 10  # tries to replace whatever is there, while other machines replace it too

Rule = Callable[[ObjectInfo | None], bool]  # whether the present version, or None when there is none, may be replaced


@dataclass(frozen=True, slots=True)
class ExpectedDigests:
    """The digests that the client sent with the content: raw bytes, or None for one that it did not send."""

    md5: bytes | None = None
    sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that was committed."""

    info: ObjectInfo
    sha256: str  # hex
    created: bool = False  # whether it is certain that the key was new


class Uploads:
    """Begins uploads.

    :param local: the driver, if its objects are files on this machine: then they need no copy in the cache.
    :param lock_timeout: seconds to wait for another upload of the same key.
    :param max_bytes: the size of the largest file that is accepted.
    """

    def __init__(
        self,
        driver: Driver,
        cache: Cache,
        negative_cache: NegativeCache,
        events: Events,
        *,
        local: LocalObjects | None,
        lock_timeout: float,
        max_bytes: int,
    ):
        self.driver = driver
        self.cache = cache
        self.negative_cache = negative_cache
        self.events = events
        self.local = local
        self.lock_timeout = lock_timeout
        self.max_bytes = max_bytes

    def begin(
        self, key: str, content_type: str, tags: Mapping[str, str] | None = None, *, md5: bool = False
    ) -> Upload:
        """Take the key's lock and begin a new version; the caller closes it.

        :param content_type: stored with the object, as are the tags.
        :param md5: whether its MD5 is computed even if the driver does not need it.
        :raises WriteConflict: another upload of the key took too long to wait for.
        :raises Overloaded: too many requests wait for others already.
        :raises KeyConflict: the backend cannot store the key beside an existing one.
        """
        return Upload(self, key, content_type, tags, self.lock(key), md5=md5)

    def stage(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> Upload:
        """Begin a new version without the key's lock; the caller closes it, and holds that lock when it commits.

        Meanwhile other writers may write the key. Their commit may make the backend discard what was written here.

        :param content_type: stored with the object, as are the tags.
        :raises KeyConflict: the backend cannot store the key beside an existing one.
        """
        return Upload(self, key, content_type, tags, contextlib.nullcontext())

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Hold the key's lock during the block.

        :raises WriteConflict: another upload of the key took too long to wait for.
        :raises Overloaded: too many requests wait for others already.
        """
        return self.events.waiting_for(self.cache.writing(key, self.lock_timeout))

    def put(
        self,
        key: str,
        content_type: str,
        body: Body,
        digests: ExpectedDigests,
        may_replace: Rule | None,
        tags: Mapping[str, str] | None = None,
    ) -> Stored:
        """Store a body under a key.

        :param content_type: stored with the object, as are the tags.
        :param digests: to compare the body with.
        :param may_replace: called with the present version, or None when there is none; None: always.
        :raises PreconditionFailed: the present version may not be replaced.
        :raises DigestMismatch: the body does not have the client's digests.
        :raises StorageError: as of :meth:`begin`, and of :class:`Upload`'s methods.
        """
        with contextlib.closing(self.begin(key, content_type, tags, md5=digests.md5 is not None)) as upload:
            expected = upload.present_version(may_replace) if may_replace else upload.known_version()
            buffer = memoryview(bytearray(READ_SIZE))
            while size := body.readinto(buffer):
                upload.write(buffer[:size])
            upload.verify(digests)
            return upload.commit_over(expected, may_replace)


class Upload:
    """An upload in progress. Without a commit, it leaves nothing behind.

    :param lock: held until the upload is closed.
    """

    def __init__(
        self,
        uploads: Uploads,
        key: str,
        content_type: str,
        tags: Mapping[str, str] | None,
        lock: contextlib.AbstractContextManager[None],
        *,
        md5: bool = False,
    ):
        self.key = key
        self._driver = uploads.driver
        self._events = uploads.events
        self._content_type = content_type
        self._max_bytes = uploads.max_bytes
        self._size = 0
        wants_md5 = md5 or uploads.driver.wants_md5
        self._digests = RunningDigests("sha256", "md5") if wants_md5 else RunningDigests("sha256")
        with contextlib.ExitStack() as stack:
            stack.callback(self._digests.close)
            stack.enter_context(lock)
            self._writer = stack.enter_context(uploads.driver.writer(key, content_type, tags))
            self._copy = _copy_of(uploads, key)
            self._held = stack.pop_all()

    def write(self, data: bytes | memoryview) -> None:
        """Append a piece; the caller may reuse its buffer afterwards.

        :raises UploadTooLarge: the file exceeds the limit.
        :raises StorageError: the backend failed.
        """
        self._size += len(data)
        if self._size > self._max_bytes:
            raise too_large(self._max_bytes)
        self._digests.update(data)
        self._writer.write(data)
        self._copy.write(data)

    def end(self) -> None:
        """The content is complete: end the threads of its digests. The commit may come later."""
        self._digests.close()

    @property
    def held(self) -> int:
        """How many bytes are kept in memory until the commit."""
        return self._writer.held

    def flush(self) -> None:
        """Send everything to the backend, so that nothing is kept in memory until the commit.

        :raises StorageError: the backend failed.
        """
        self._writer.flush()

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything that was written, in hexadecimal digits."""
        return self._digests.hex("sha256")

    def verify(self, expected: ExpectedDigests) -> None:
        """Compare the content with the client's digests.

        :raises DigestMismatch: they differ.
        """
        sha256, md5 = self._digests.digest("sha256"), self._digests.digest("md5")
        if expected.sha256 not in (None, sha256):
            raise DigestMismatch(f"the body's SHA-256 is {self.sha256}, not what Repr-Digest says")
        if md5 is not None and expected.md5 not in (None, md5):
            raise DigestMismatch(f"the body's MD5 is {md5.hex()}, not what Content-MD5 says")

    def known_version(self) -> str | None:
        """The ETag of the version that is probably stored, found out without a request to a backend elsewhere.

        That is the copy's, or the local file's; None: there is none.
        """
        return self._copy.known_version()

    def present_version(self, may_replace: Rule | None = None) -> str | None:
        """The ETag of the version that is stored; None: there is none.

        :raises PreconditionFailed: it may not be replaced.
        """
        try:
            present = self._driver.stat(self.key)
        except ObjectNotFound:
            present = None
        if may_replace is not None and not may_replace(present):
            raise PreconditionFailed("the stored file is not the version that the request asks for")
        return present.etag if present is not None else None

    def commit(self, *, replay: bool = True) -> Stored:
        """Make it the object, whatever is stored: every worker serves it once this has returned.

        Where there is a cached copy, its version is probably the stored one. Else this tries to commit a new object,
        which costs more requests to the backend only if there was one after all. The caller holds the key's lock.

        :param replay: whether to send the content again if the backend has discarded it. That takes as much memory
            as an upload.
        :raises WriteConflict: the backend has discarded the content, and it may not or cannot be sent again; or other
            machines replace the object all the time.
        :raises OutcomeUnknown: it may have been stored, or still may be; the key is in doubt then.
        :raises StorageError: the commit failed.
        """
        return self.commit_over(self.known_version(), replay=replay)

    def commit_over(self, expected: str | None, may_replace: Rule | None = None, *, replay: bool = True) -> Stored:
        """As :meth:`commit`, if the stored version may be replaced.

        :param expected: the ETag of the version that is probably stored; None: there is none.
        :param may_replace: asked again if another version is stored.
        :raises PreconditionFailed: the stored version may not be replaced.
        """
        for _ in range(COMMITS):
            try:
                return Stored(self._commit(expected, replay), self.sha256, created=expected is None)
            except PreconditionFailed:
                expected = self.present_version(may_replace)
        raise WriteConflict("other machines replace this file all the time; try later")

    def _commit(self, expected: str | None, replay: bool) -> ObjectInfo:
        digests = Digests(self._size, self.sha256, self._digests.digest("md5"))
        with self._copy.committing(expected):
            info = self._writer.commit(digests, expected, self._copy.replay if replay else None)
        self._copy.publish(info, replaced=expected is not None)
        self._events.uploaded()
        return info

    def close(self) -> None:
        """Discard what was not committed, and release the lock. Idempotent."""
        with self._held:  # the lock is released even if a file cannot be removed
            self._copy.discard()


class _Copy:
    """An upload's copy in the cache, which replaces that of the old version.

    The caller holds the key's lock. On a full disk there is no copy, and the upload goes on.
    """

    def __init__(self, cache: Cache, negative_cache: NegativeCache, key: str):
        self._cache = cache
        self._negative_cache = negative_cache
        self._key = key
        self._part: durable.NewFile | None = None
        with contextlib.suppress(InsufficientStorage):
            self._part = cache.new_part(key)

    def write(self, data: bytes | memoryview) -> None:
        """Append a piece."""
        if self._part is None:
            return
        try:
            self._part.write(data)
            self._part.begin_writeback()
        except InsufficientStorage:
            self._part.discard()
            self._part = None

    @property
    def replay(self) -> Callable[[], Iterator[bytes]] | None:
        """A function that returns the whole content again, in pieces; None: the content is not kept."""
        return self._content if self._part else None

    def _content(self) -> Iterator[bytes]:
        assert self._part is not None
        for start in range(0, self._part.size, READ_SIZE):
            yield os.pread(self._part.fileno(), READ_SIZE, start)

    def known_version(self) -> str | None:
        """The ETag of the present copy; None: there is none."""
        return self._cache.known_version(self._key)

    @contextlib.contextmanager
    def committing(self, expected: str | None) -> Iterator[None]:
        """The driver commits during the block. If the outcome is unknown, the key is in doubt.

        :param expected: as for :func:`.changing`.
        """
        with changing(self._cache, self._negative_cache, self._key, expected):
            yield
        # From here on, no request may be answered with the state before the commit, whether or not there is a copy.
        self._cache.revoke_fill(self._key)
        self._negative_cache.changed(self._key)

    def publish(self, info: ObjectInfo, *, replaced: bool) -> None:
        """Serve the new copy, in every worker, in place of the old one.

        :param replaced: whether there was an object before.
        """
        if self._part is None:
            self._cache.acknowledge(self._key)
            return
        try:
            self._cache.publish(self._part, info, replaced=replaced)
        except InsufficientStorage:  # the copy of the previous version is gone as well
            self._part.discard()
            self._cache.acknowledge(self._key)

    def discard(self) -> None:
        """Remove it unless it was published. Idempotent."""
        if self._part is not None:
            self._part.discard()


class _NoCopy:
    """In place of :class:`_Copy` where the driver's objects are local files, which need no copy."""

    replay = None

    def __init__(self, local: LocalObjects, key: str):
        self._local = local
        self._key = key

    def committing(self, expected: str | None) -> contextlib.AbstractContextManager[None]:
        """Nothing can be in doubt."""
        return contextlib.nullcontext()

    def write(self, data: bytes | memoryview) -> None: ...

    def known_version(self) -> str | None:
        """The ETag of the present file; None: there is none."""
        with contextlib.suppress(ObjectNotFound):
            info, fd = self._local.open(self._key)
            os.close(fd)
            return info.etag
        return None

    def publish(self, info: ObjectInfo, *, replaced: bool) -> None: ...

    def discard(self) -> None: ...


def _copy_of(uploads: Uploads, key: str) -> _Copy | _NoCopy:
    if uploads.local is not None:
        return _NoCopy(uploads.local, key)
    return _Copy(uploads.cache, uploads.negative_cache, key)
