# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading from Azure Blob Storage: properties and ranges of content, without the SDK.

A reader receives its object in the caller's thread, range by range. A fast connection is the only one: each request
costs money, and several connections would share the same bandwidth. When a connection is slow, because the backend
limits each one as Azure does, the next ranges are requested on further connections, and their bytes are buffered
while the first has none. So a slow reader holds no thread, and a fast one never waits for another thread.
"""

from __future__ import annotations

import contextlib
import re
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any

from kci_storage.drivers.azure import service
from kci_storage.drivers.azure.errors import Unanswered, nonsense, silence
from kci_storage.drivers.azure.http import Answer, wait_for
from kci_storage.drivers.azure.service import Blobs, Operation
from kci_storage.drivers.base import ObjectInfo, ObjectReader
from kci_storage.errors import (
    BackendError,
    BackendThrottled,
    BackendTimeout,
    CorruptObject,
    ObjectChanged,
    ObjectNotFound,
)

READ_SIZE = 16 * 1024 * 1024  # bytes of a download's first request, and of each over a connection that is slow
LONG_READ_SIZE = 256 * 1024 * 1024  # bytes of one over a connection that is fast
FAST_RATE = 128 * 1024 * 1024  # bytes a second; less is slow
PATIENCE_SECONDS = 0.01  # of waiting after which a new connection counts as slow,
MOST_PATIENCE_SECONDS = 0.1  # and at most, one that was fast before
READS_AHEAD = 2  # further ranges of one download that are requested while its connection is slow
ASK_AHEAD = 8 * 1024 * 1024  # bytes before the end of a range at which a fast reader requests the next one
HELD_SIZE = 8 * 1024 * 1024  # bytes of each further range that are buffered in memory
HELD_PIECE = 64 * 1024  # bytes of a further range received at a time; malloc() would map each larger piece anew
LOOK_SECONDS = 0.02  # between two checks whether another thread's request has been answered
GATHER_SECONDS = 0.005  # that a reader waits for more bytes once it has some

UPLOAD_ID = "uploadid"  # metadata of each upload of this server; by it a writer recognises its own object

_CODINGS = re.compile(r"[A-Za-z0-9._-]+(?: *, *[A-Za-z0-9._-]+)*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_RANGE = re.compile(r"bytes ([0-9]+)-(-?[0-9]+)/([0-9]+)\Z")  # Azurite says 0--1/0 of nothing


class Properties:
    """Makes objects' properties.

    :param verify_all: whether digests bind that another program has stored.
    """

    def __init__(self, verify_all: bool):
        self._verify_all = verify_all

    def of(self, key: str, headers: Mapping[str, str], size: Any, md5: str | None) -> ObjectInfo:
        """The properties of an object.

        :param headers: with names in lower case.
        :param size: in bytes, maybe as text.
        :param md5: of the whole content, in base64.
        :raises ObjectNotFound: it is another program's marker of a folder.
        :raises BackendError: the headers make no sense.
        """
        if is_folder_marker(headers):
            raise ObjectNotFound("no such file")
        try:
            info = ObjectInfo(
                key,
                int(size),
                headers["etag"].strip('"'),
                int(parsedate_to_datetime(headers["last-modified"]).timestamp()),
                headers.get("content-type"),
                valid_sha256(headers.get("x-ms-meta-sha256")),
                b64decode(md5) if md5 else None,
                content_encoding=_coding(headers.get("content-encoding", "")),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise nonsense(repr(exc)) from exc
        if self._verify_all or f"x-ms-meta-{UPLOAD_ID}" in headers:
            return info
        return _with_claims(info)


def _with_claims(info: ObjectInfo) -> ObjectInfo:
    """The same, with digests that are another program's word."""
    md5 = ("md5", info.md5.hex()) if info.md5 is not None else None
    claimed = ("sha256", info.sha256) if info.sha256 is not None else md5
    return replace(info, sha256=None, md5=None, claimed_digest=claimed) if claimed else info


def _coding(text: str) -> str | None:
    """A content coding, or several, that may be sent to clients; None: it is none (RFC 9110, 8.4).

    >>> _coding("gzip, br"), _coding("identity"), _coding("")
    ('gzip, br', None, None)
    """
    return text if _CODINGS.match(text) and text.lower() != "identity" else None


def is_folder_marker(headers: Mapping[str, str]) -> bool:
    """Whether a blob is no object, but says that there is a folder of its name.

    Accounts with a hierarchical namespace show folders so, and Hadoop's drivers make such blobs.
    """
    return headers.get("x-ms-meta-hdi_isfolder", "").lower() == "true"


def valid_sha256(text: str | None) -> str | None:
    """The text, if it is a SHA-256 in hex. Another program's metadata may have anything under that name."""
    return text if text and _SHA256.match(text) else None


class BlobReads:
    """The reading half of one container.

    :param blobs: with a signature that allows reading.
    :param properties: makes the objects' properties.
    :param submit: calls a function in another thread.
    """

    def __init__(self, blobs: Blobs, properties: Properties, submit: Callable[..., Future[Any]]):
        self.submit = submit
        self._properties = properties
        self.read_timeout = blobs.service.pool.read_timeout  # seconds
        self._blobs = blobs

    def stat(self, key: str) -> ObjectInfo:
        """An object's properties.

        :raises ObjectNotFound: there is none.
        :raises BackendError: the backend failed.
        """
        return self.stat_with_metadata(key)[0]

    def stat_with_metadata(self, key: str) -> tuple[ObjectInfo, dict[str, str]]:
        """An object's properties, and the headers that have its metadata; as :meth:`stat` otherwise."""
        headers = self.headers(key)
        return self._properties.of(key, headers, headers.get("content-length"), headers.get("content-md5")), headers

    def headers(self, key: str) -> dict[str, str]:
        """The headers that have a blob's properties, also those of another program's folder marker.

        :raises ObjectNotFound: there is no blob.
        :raises BackendError: the backend failed.
        """
        return self._blobs.ask(_PROPERTIES, key, {}).headers

    def read(self, key: str, start: int, stop: int | None, etag: str | None) -> ObjectReader:
        """See :meth:`kci_storage.drivers.base.Driver.read`."""
        first_stop = start + READ_SIZE if stop is None else min(stop, start + READ_SIZE)
        info, answer = self.ask(key, start, first_stop, etag)
        return _Reader(self, info, answer, start, info.size if stop is None else min(stop, info.size))

    def ask(self, key: str, start: int, stop: int, etag: str | None) -> tuple[ObjectInfo, Answer | None]:
        """Request one range of an object.

        :param stop: bytes; beyond the end means the end, and not above ``start`` means an empty range.
        :param etag: the only version wanted; None: the current one.
        :returns: the object's properties, and the answer, whose body is still to come; None: the range is empty.
        :raises ObjectNotFound: there is no such object.
        :raises ObjectChanged: the current version is not ``etag``.
        :raises CorruptObject: the answer contradicts itself.
        :raises BackendError: the backend failed.
        """
        answer = None
        if stop > start:
            with contextlib.suppress(_NotThatRange):
                headers = {"x-ms-range": f"bytes={start}-{stop - 1}", **_condition(etag)}
                answer = self._blobs.ask(_CONTENT, key, headers)
        if answer is None:
            info = self.stat(key)
        else:
            info = self._checked_info(key, answer, start, stop)
        # Azurite takes the headers later than the content, and does not compare them with the condition.
        if etag not in (None, info.etag) or (answer is None and start < min(stop, info.size)):
            if answer is not None:
                answer.close()
            raise ObjectChanged("the object was replaced")
        return info, answer

    def _checked_info(self, key: str, answer: Answer, start: int, stop: int) -> ObjectInfo:
        """The properties of the object, from an answer that has a range of it.

        :raises CorruptObject: the range is another one than was requested, cut at the object's end.
        :raises BackendError: the answer makes no sense.
        """
        try:
            found = _RANGE.match(answer.headers.get("content-range", ""))
            if found is None:
                raise nonsense("there is no range in it")
            first, last, size = map(int, found.groups())
            # This MD5 is of the whole object; Content-MD5 is of the range.
            info = self._properties.of(key, answer.headers, size, answer.headers.get("x-ms-blob-content-md5"))
            if (first, last + 1) != (start, min(stop, size)):
                raise CorruptObject("the backend sent something else than was asked for", detail=found[0])
        except (BackendError, ObjectNotFound):
            answer.close()
            raise
        return info

    def ask_again(self, info: ObjectInfo, start: int, stop: int) -> Answer:
        """Request a further range of the same version.

        :raises ObjectChanged: the version is gone.
        :raises CorruptObject: the object has another size than before.
        """
        try:
            found, answer = self.ask(info.key, start, stop, info.etag)
        except ObjectNotFound as exc:
            raise ObjectChanged("the object was deleted") from exc
        if answer is None or found.size != info.size:
            if answer is not None:
                answer.close()
            raise CorruptObject("the backend sent a damaged object", detail=f"{found.size} of {info.size} B")
        return answer

    def uncommitted_block_ids(self, key: str) -> list[str]:
        """The ids of the blocks that were staged for an object and not committed, in base64 (Get Block List).

        :raises ObjectNotFound: there is neither an object nor a block.
        """
        query = "comp=blocklist&blocklisttype=uncommitted&"
        return re.findall("<Name>([^<]+)</Name>", self._blobs.ask(_BLOCK_LIST, key, {}, query=query).decode())


class _NotThatRange(Exception):
    """The backend has no such range: of another version, or beyond the end (of an empty object, any range is)."""


def _has_its_length(answer: Answer) -> bool:
    """Whether the body will be as long as the range that the answer says it is."""
    found = _RANGE.match(answer.headers.get("content-range", ""))
    return found is not None and answer.length == int(found[2]) - int(found[1]) + 1


def _checked_length(answer: Answer) -> Answer:
    if not _has_its_length(answer):
        answer.close()
        raise Unanswered("the backend sent something else than was asked for")
    return answer


_PROPERTIES = Operation("HEAD", (200,), lambda answer: answer)
_CONTENT = Operation(
    "GET", (200, 206), _checked_length, {"ConditionNotMet": _NotThatRange, "InvalidRange": _NotThatRange}
)
_BLOCK_LIST = Operation("GET", (200,), Answer.content)


class _Reader(ObjectReader):
    """An object's content by range requests, of which a few may run ahead.

    Each request but the first is pinned to the version (``If-Match``).
    """

    def __init__(self, reads: BlobReads, info: ObjectInfo, answer: Answer | None, start: int, stop: int):
        self.info = info
        self._reads = reads
        self._ranges = deque([_Range(reads, info, start, min(start + READ_SIZE, stop), answer)] if answer else [])
        self._next = min(start + READ_SIZE, stop)  # where the next range begins
        self._stop = stop
        self._pace = _Pace()
        self._begun = False
        self._failure: BackendError | None = None  # raised by the next call, since this one had bytes to return

    def readinto(self, buffer: memoryview) -> int:
        if self._failure is not None:
            raise self._failure
        size = 0
        try:
            for received in self._arriving(buffer):
                size += received
        except BackendError as exc:
            if not size:
                raise
            self._failure = exc
        self._begun = True
        return size

    def _arriving(self, buffer: memoryview) -> Iterator[int]:
        """Fill the buffer until it is full or no more bytes come soon; how many bytes each step adds."""
        deadline = time.monotonic() + self._reads.read_timeout
        begun = False
        while buffer and self._present():
            size = self._ranges[0].receive_into(buffer)
            if size:
                self._pace.received(size)
                yield size
                buffer = buffer[size:]
                if not self._begun:  # the first bytes go to the client before any further request is made
                    return
                if not begun:
                    begun, deadline = True, time.monotonic() + GATHER_SECONDS
            elif not self._wait(deadline, len(buffer)):
                if begun:
                    return
                raise silence("nothing came of its content")

    def _present(self) -> bool:
        """Whether there is a range to receive, the first in the queue. Further ones are requested as needed."""
        while self._ranges and self._ranges[0].is_done:
            self._ranges.popleft()
        while self._begun and self._wants_another():
            size = LONG_READ_SIZE if self._pace.is_fast else READ_SIZE
            start, self._next = self._next, min(self._next + size, self._stop)
            self._ranges.append(_Range(self._reads, self.info, start, self._next))
        return bool(self._ranges)

    def _wants_another(self) -> bool:
        """Whether to request the next range now: at the end of a fast one, or as help for a slow one."""
        if self._next == self._stop:
            return False
        if self._pace.is_fast:
            return not self._ranges or (len(self._ranges) == 1 and self._ranges[0].missing <= ASK_AHEAD)
        return len(self._ranges) <= READS_AHEAD

    def _wait(self, deadline: float, wanted: int) -> bool:
        """Wait for more of the first range; False: it did not come in time.

        :param wanted: bytes that can be used now.
        """
        first, left = self._ranges[0].answer, deadline - time.monotonic()
        if first is None:  # it broke off, and will be requested again
            return True
        if left <= 0:
            return False
        with self._pace.waiting():
            if not self._pace.is_fast:
                return self._wait_beside(first, deadline)
            first.wait_for(wanted, min(left, GATHER_SECONDS))
        return True  # or not in time for a fast connection: the caller looks again

    def _wait_beside(self, first: Answer, deadline: float) -> bool:
        """Wait for more of the first range, and meanwhile buffer the others; False: none came in time."""
        _, *others = self._ranges
        while (left := deadline - time.monotonic()) > 0:
            if [each for each in others if not each.has_answer()]:
                left = min(left, LOOK_SECONDS)
            later = {each.answer: each for each in others if each.answer is not None and each.has_room}
            ready = wait_for([first, *later], left)
            for answer in ready:
                if answer in later:
                    later[answer].hold()
            if first in ready:
                return True
        return False

    def close(self) -> None:
        self._next = self._stop
        while self._ranges:
            self._ranges.pop().close()


class _Pace:
    """Whether a connection is so fast that further ones would not help.

    A token bucket of seconds: :data:`FAST_RATE` received bytes add one, and time spent waiting is taken out.
    """

    def __init__(self) -> None:
        self._credit = PATIENCE_SECONDS

    @property
    def is_fast(self) -> bool:
        """Whether the bucket is not empty."""
        return self._credit > 0

    def received(self, size: int) -> None:
        """Count received bytes."""
        self._add(size / FAST_RATE)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting."""
        started = time.monotonic()
        yield
        self._add(started - time.monotonic())

    def _add(self, seconds: float) -> None:
        self._credit = max(-MOST_PATIENCE_SECONDS, min(self._credit + seconds, MOST_PATIENCE_SECONDS))


class _Range:
    """A range of one version while it arrives. Where it breaks off, the rest is requested again, a few times.

    :param answer: the answer that has it; None: it is requested now, in another thread.
    """

    def __init__(self, reads: BlobReads, info: ObjectInfo, start: int, stop: int, answer: Answer | None = None):
        self.answer = answer  # None: not here yet, or not any more
        self._reads = reads
        self._info = info
        self._position = start  # of the next byte that comes from the backend
        self._stop = stop
        self._asked = None if answer else reads.submit(reads.ask_again, info, start, stop)
        self._held: deque[memoryview] = deque()
        self._held_size = 0  # bytes
        self._broken = 0  # how often it has been

    @property
    def is_done(self) -> bool:
        """Whether the reader has all of it."""
        return self._position == self._stop and not self._held

    @property
    def missing(self) -> int:
        """Bytes that are still to come from the backend."""
        return self._stop - self._position

    @property
    def has_room(self) -> bool:
        """Whether more of it may be buffered."""
        return self._position < self._stop and self._held_size < HELD_SIZE

    def receive_into(self, buffer: memoryview) -> int | None:
        """Put the next bytes at the beginning of ``buffer``; how many; None: there are none yet.

        :raises ObjectChanged: the version is gone.
        :raises BackendError: it has failed too often, or in a way that a retry does not change.
        """
        if self._held:
            return self._give(buffer)
        try:
            return self._receive(self._answer(), buffer)
        except (BackendTimeout, BackendThrottled, ObjectChanged, CorruptObject):
            raise
        except BackendError:
            if self._broken == service.RETRIES:
                raise
            self._break_off()
            return None

    def _answer(self) -> Answer:
        if self.answer is None:
            if self._asked is None:
                time.sleep(max(self._broken - 1, 0) * service.RETRY_WAIT)
                self.answer = self._reads.ask_again(self._info, self._position, self._stop)
            else:
                asked, self._asked = self._asked, None
                self.answer = asked.result()
        return self.answer

    def _receive(self, answer: Answer, buffer: memoryview) -> int | None:
        size = answer.receive_into(buffer)
        self._position += size or 0
        return size

    def _break_off(self) -> None:
        self._broken += 1
        if self.answer is not None:
            self.answer.close()
        self.answer = None

    def _give(self, buffer: memoryview) -> int:
        piece = self._held.popleft()
        size = min(len(piece), len(buffer))
        buffer[:size] = piece[:size]
        if size < len(piece):
            self._held.appendleft(piece[size:])
        self._held_size -= size
        return size

    def has_answer(self) -> bool:
        """Whether the request has been answered. A failure is raised only when the reader gets to this range."""
        if self._asked is not None and self._asked.done() and self._asked.exception() is None:
            self._answer()
        return self._asked is None or self._asked.done()

    def hold(self) -> None:
        """Buffer some of the bytes that have come. A failure is raised only when the reader gets to this range."""
        assert self.answer is not None
        piece = memoryview(bytearray(HELD_PIECE))
        try:
            size = self._receive(self.answer, piece)
        except BackendError:
            self._break_off()
        else:
            if size:
                self._held.append(piece[:size])
                self._held_size += size

    def close(self) -> None:
        """Give it up. An answer that is still to come will be closed when it does."""
        if self.answer is not None:
            self.answer.close()
        if self._asked is not None and not self._asked.cancel():
            self._asked.add_done_callback(_close_answer)


def _close_answer(asked: Future[Answer]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


def _condition(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": pinned(etag)}


def pinned(etag: str) -> str:
    """The value of ``If-Match`` for a version.

    A star, quoted or not, would match any version, and is in no ETag.

    >>> pinned("0x1"), pinned("*")
    ('"0x1"', '"-"')
    """
    return '"{}"'.format(etag.replace("*", "-"))
