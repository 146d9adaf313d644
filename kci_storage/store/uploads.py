# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking objects in: one pass from the client through the hashes to the driver, and beside it to the cache.

Nothing of a file is held in memory beyond the pieces in hand, and nothing is committed before the whole body has been
seen. The driver commits first, then the cache: an upload that was answered with success is in both, and one that was
cut off anywhere is in neither.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kci_storage.cache.directory import Cache
from kci_storage.drivers.base import Digests, Driver, Expectation, ObjectInfo
from kci_storage.errors import DigestMismatch, InsufficientStorage, KeyConflict, ObjectNotFound, PreconditionFailed
from kci_storage.events import Events
from kci_storage.files import durable
from kci_storage.http.multipart import READ_SIZE, Body, too_large
from kci_storage.store.digests import RunningDigests
from kci_storage.store.negative_cache import NegativeCache


@dataclass(frozen=True, slots=True)
class ExpectedDigests:
    """What the client says of the content: raw digests, or None for what it does not say."""

    md5: bytes | None = None
    sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that was committed."""

    info: ObjectInfo
    sha256: str  # hex
    created: bool = False  # whether it is certain that there was none before


class Uploads:
    """Begins uploads.

    :param cached: whether a copy of what is uploaded goes into the cache.
    :param lock_timeout: seconds to wait for another upload of the same key.
    :param max_bytes: the largest file that is taken.
    """

    def __init__(
        self,
        driver: Driver,
        cache: Cache,
        misses: NegativeCache,
        events: Events,
        *,
        cached: bool,
        lock_timeout: float,
        max_bytes: int,
    ):
        self.driver = driver
        self.cache = cache
        self.misses = misses
        self.events = events
        self.cached = cached
        self.lock_timeout = lock_timeout
        self.max_bytes = max_bytes

    def begin(
        self, key: str, content_type: str, tags: Mapping[str, str] | None = None, *, md5: bool = False
    ) -> Upload:
        """Take the key's lock and begin a new version; the caller closes it.

        :param tags: stored with it.
        :param md5: whether its MD5 is wanted even if the driver does not need it.
        :raises WriteConflict: another upload of the key took too long to wait for.
        :raises Overloaded: too many requests wait for others already.
        :raises KeyConflict: the backend cannot hold the key beside one that it has.
        """
        return Upload(self, key, content_type, tags, self.lock(key), md5=md5)

    def stage(self, key: str, content_type: str, tags: Mapping[str, str] | None = None) -> Upload:
        """Begin a new version without the key's lock; the caller closes it, and has that lock when it commits.

        Meanwhile others may write the key. Their commit may make the backend throw away what was written here.

        :param tags: stored with it.
        :raises KeyConflict: the backend cannot hold the key beside one that it has.
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
        may_replace: Callable[[ObjectInfo | None], bool] | None,
        tags: Mapping[str, str] | None = None,
    ) -> Stored:
        """Store a body under a key.

        :param tags: stored with it.
        :param may_replace: None: always; else it is given the present version, or None when there is none.
        :raises PreconditionFailed: the present version may not be replaced.
        :raises DigestMismatch: the body is not what the client said.
        """
        with contextlib.closing(self.begin(key, content_type, tags, md5=digests.md5 is not None)) as upload:
            expected = self._expectation(key, may_replace) if may_replace else None
            buffer = memoryview(bytearray(READ_SIZE))
            while size := body.readinto(buffer):
                upload.write(buffer[:size])
            upload.verify(digests)
            if expected is None:
                return upload.commit_new_or_replaced()
            return Stored(upload.commit(expected), upload.sha256, created=expected is Expectation.NOTHING)

    def _expectation(self, key: str, may_replace: Callable[[ObjectInfo | None], bool]) -> str | Expectation:
        """What must be stored at the commit, since it is stored now and may be replaced."""
        try:
            present = self.driver.stat(key)
        except ObjectNotFound:
            present = None
        if not may_replace(present):
            raise PreconditionFailed("the stored file is not the version that the request asks for")
        return present.etag if present else Expectation.NOTHING


class Upload:
    """A file on its way in. Without a commit, it leaves nothing.

    :param lock: what it holds until it is closed.
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
            self._copy = _Copy(uploads.cache, uploads.misses, key) if uploads.cached else _NoCopy()
            self._held = stack.pop_all()

    def write(self, data: bytes | memoryview) -> None:
        """Take the next piece, which is the caller's again afterwards.

        :raises UploadTooLarge: it is one too many.
        :raises StorageError: the backend failed.
        """
        self._size += len(data)
        if self._size > self._max_bytes:
            raise too_large(self._max_bytes)
        self._digests.update(data)
        self._writer.write(data)
        self._copy.write(data)

    def end(self) -> None:
        """All of it has come; it may wait for its commit. The threads and buffers of its digests are not kept."""
        self._digests.close()

    @property
    def held(self) -> int:
        """Bytes that are kept in memory until the commit."""
        return self._writer.held

    def flush(self) -> None:
        """Keep nothing in memory until the commit.

        :raises StorageError: the backend failed.
        """
        self._writer.flush()

    @property
    def sha256(self) -> str:
        """Hex, of all that was written."""
        return self._digests.hex("sha256")

    def verify(self, expected: ExpectedDigests) -> None:
        """Compare what was written with what the client said.

        :raises DigestMismatch: they differ.
        """
        sha256, md5 = self._digests.digest("sha256"), self._digests.digest("md5")
        if expected.sha256 not in (None, sha256):
            raise DigestMismatch(f"the body's SHA-256 is {self.sha256}, not what Repr-Digest says")
        if md5 is not None and expected.md5 not in (None, md5):
            raise DigestMismatch(f"the body's MD5 is {md5.hex()}, not what Content-MD5 says")

    def commit(self, expected: str | Expectation = Expectation.ANYTHING, *, replay: bool = True) -> ObjectInfo:
        """Make it the object, for every worker, from the moment that this returns. The key's lock is held.

        :param expected: what must be stored at this moment.
        :param replay: whether to send again what the backend has thrown away, which takes memory as an upload does.
        :raises WriteConflict: it has, and that may not or cannot be.
        :raises PreconditionFailed: something else is; commit may be called again.
        :raises StorageError: it failed, or nobody knows; the copy of the previous version is doubted then.
        """
        digests = Digests(self._size, self.sha256, self._digests.digest("md5"))
        with self._copy.committing():
            info = self._writer.commit(digests, expected, self._copy.replay if replay else None)
        self._copy.publish(info)
        self._events.uploaded()
        return info

    def commit_new_or_replaced(self) -> Stored:
        """As :meth:`commit`, over whatever is there, and say whether there was something.

        Where there is a cached copy, there was something. Else it tries the commit as a new object first, which costs
        the backend more requests only where there was one after all.
        """
        if self._copy.has_predecessor():
            return Stored(self.commit(), self.sha256)
        try:
            return Stored(self.commit(Expectation.NOTHING), self.sha256, created=True)
        except PreconditionFailed:
            return Stored(self.commit(), self.sha256)

    def close(self) -> None:
        """Let go of everything; what was not committed is gone. Idempotent."""
        with self._held:  # the lock goes even if a file cannot be removed
            self._copy.discard()


class _Copy:
    """What an upload means for the cache: a copy of the new version, and nothing that is left of the old one.

    The caller holds the key's lock. A disk that is full costs the copy, and not the upload.
    """

    def __init__(self, cache: Cache, misses: NegativeCache, key: str):
        self._cache = cache
        self._misses = misses
        self._key = key
        self._part: durable.NewFile | None = None
        with contextlib.suppress(InsufficientStorage):
            self._part = cache.new_part(key)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next piece."""
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
        """What gives the whole content again; None: nothing does."""
        return self._content if self._part else None

    def _content(self) -> Iterator[bytes]:
        assert self._part is not None
        for start in range(0, self._part.size, READ_SIZE):
            yield os.pread(self._part.fileno(), READ_SIZE, start)

    def has_predecessor(self) -> bool:
        """Whether there is a copy of the version before."""
        return self._cache.has_copy(self._key)

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """The driver commits during the block. If it fails, or nobody knows, the old copy is doubted."""
        self._cache.announce_commit(self._key)
        try:
            yield
        except (PreconditionFailed, KeyConflict):
            raise  # nothing has changed
        except BaseException:
            self._cache.doubt(self._key)
            raise
        # Whatever comes of the copy, nobody may go on with what was true before the commit.
        self._cache.revoke_fill(self._key)
        self._misses.changed(self._key)

    def publish(self, info: ObjectInfo) -> None:
        """Have it served, by every worker, in place of the one before."""
        if self._part is None:
            self._cache.remove(self._key)
            return
        try:
            self._cache.publish(self._part, info)
        except InsufficientStorage:  # the copy of the previous version is gone as well
            self._part.discard()

    def discard(self) -> None:
        """Remove it unless it was published. Idempotent."""
        if self._part is not None:
            self._part.discard()


class _NoCopy:
    """The same where objects are served from where the driver has them: nothing is to be done."""

    replay = None
    committing = contextlib.nullcontext

    def write(self, data: bytes | memoryview) -> None: ...

    def has_predecessor(self) -> bool:
        """Nobody knows."""
        return False

    def publish(self, info: ObjectInfo) -> None: ...

    def discard(self) -> None: ...
