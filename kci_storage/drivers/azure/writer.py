# SPDX-License-Identifier: LGPL-2.1-or-later
"""An upload to Azure Blob Storage: blocks are staged while it arrives, and their list is committed at the end.

A small upload is a single request. The blocks of an upload that was given up cannot be deleted. They are visible to
nobody, and Azure removes them after a week.
"""

from __future__ import annotations

import contextlib
import io
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

from kci_storage.drivers.azure import foreign_blocks
from kci_storage.drivers.azure.errors import BackendRefusal
from kci_storage.drivers.azure.http import RepeatableBody
from kci_storage.drivers.azure.outcomes import LostAnswers, certain
from kci_storage.drivers.azure.reads import UPLOAD_ID, BlobReads, is_folder_marker
from kci_storage.drivers.azure.writes import BlobWrites, BlocksLost, condition, new_block_id, properties
from kci_storage.drivers.base import Digests, ObjectInfo, ObjectWriter
from kci_storage.errors import KeyConflict, ObjectNotFound, PreconditionFailed, WriteConflict

BLOCKS_IN_FLIGHT = 4  # of one upload; one more block is being filled
BLOCK_ID_SIZE = 48  # bytes; 64 characters of base64, what most other clients use

NOT_SINCE_1970 = {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"}  # no object meets this condition


class AzureWriter(ObjectWriter):
    """A new object: blocks on their way to the backend or, up to the size of one block, bytes in memory.

    A block's buffer is reused once the backend has the block, since fresh memory would cost page faults.

    :param block_size: bytes of one block.
    :param tags: stored with the object.
    """

    def __init__(
        self,
        reads: BlobReads,
        writes: BlobWrites,
        block_size: int,
        key: str,
        content_type: str,
        tags: Mapping[str, str] | None,
    ):
        self._reads = reads
        self._writes = writes
        self._block_size = block_size
        self._key = key
        self._content_type = content_type
        self._tags = tags
        self._upload_id = secrets.token_hex(16)
        self._lost_answers = LostAnswers()  # of all its commits
        self._refused_as_new = False  # whether a commit was refused because there is an object
        self._begin(BLOCK_ID_SIZE)

    def _begin(self, block_id_size: int) -> None:
        self._block_id_size = block_id_size
        self._block = io.BytesIO()  # the one that is being filled
        self._spare: list[io.BytesIO] = []  # buffers whose content the backend has
        self._block_ids: list[str] = []
        self._in_flight: deque[Future[io.BytesIO]] = deque()
        self._lost = False
        self._whole: RepeatableBody | None = None  # the content, where blocks cannot be used

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while self._block.tell() + len(rest) > self._block_size:
            room = self._block_size - self._block.tell()
            self._block.write(rest[:room])
            rest = rest[room:]
            self._stage()
        self._block.write(rest)

    @property
    def held(self) -> int:
        return self._block.tell() + self._block_size * (len(self._in_flight) + len(self._spare))

    def flush(self) -> None:
        if self._block.tell():
            self._stage()
        self._settle_all()
        self._spare.clear()
        self._block = io.BytesIO()

    def _stage(self) -> None:
        """Send the block in memory, as soon as few enough others are in flight."""
        while len(self._in_flight) >= BLOCKS_IN_FLIGHT:
            self._settle()
        if self._lost:  # all blocks will be staged again from the replay
            self._block.seek(0)
            return
        block, self._block = self._block, self._spare.pop() if self._spare else io.BytesIO()
        self._block_ids.append(new_block_id(self._block_id_size))
        self._in_flight.append(self._writes.submit(self._send, self._block_ids[-1], block))

    def _send(self, block_id: str, block: io.BytesIO) -> io.BytesIO:
        """Stage a block, and return its buffer for reuse."""
        with _content(block) as content:
            self._writes.stage(self._key, block_id, content)
        block.seek(0)
        return block

    def _settle(self) -> None:
        try:
            self._spare.append(self._in_flight.popleft().result())
        except BlocksLost:
            self._lost = True

    def _settle_all(self) -> None:
        while self._in_flight:
            self._settle()

    def commit(
        self,
        digests: Digests,
        expected: str | None,
        replay: Callable[[], Iterable[bytes]] | None = None,
    ) -> ObjectInfo:
        with certain(self._lost_answers, expected):
            return self._commit_or_stage_again(digests, expected, replay)

    def _commit_or_stage_again(
        self, digests: Digests, expected: str | None, replay: Callable[[], Iterable[bytes]] | None
    ) -> ObjectInfo:
        for _ in range(3):
            try:
                return self._commit(digests, expected)
            except BlocksLost as exc:
                if replay is None:
                    raise self._conflict() from exc
            self._send_again(digests.size, replay)
        raise self._conflict()

    def _conflict(self) -> WriteConflict:
        if foreign_blocks.block_id_size(self._reads, self._key) not in (None, BLOCK_ID_SIZE):
            return foreign_blocks.in_the_way()
        return WriteConflict("another upload of this file came in between; try again")

    def _commit(self, digests: Digests, expected: str | None) -> ObjectInfo:
        try:
            etag, modified = self._put(digests, expected)
        except (PreconditionFailed, BlocksLost) as exc:
            if expected is None and isinstance(exc, PreconditionFailed):
                self._refuse_as_new()
            landed = self._landed() if self._lost_answers else None
            if landed is None:
                raise
            return landed
        return ObjectInfo(self._key, digests.size, etag, modified, self._content_type, digests.sha256, digests.md5)

    def _put(self, digests: Digests, expected: str | None) -> tuple[str, int]:
        """Commit the content with one request; the object's ETag and time of modification."""
        tags = self._writes.tag_policy.to_send(self._tags)
        try:
            return self._put_tagged(digests, expected, tags)
        except BackendRefusal as exc:
            if not tags:
                raise
            self._writes.tag_policy.check(exc)
        stored = self._put_tagged(digests, expected, None)
        self._writes.tag_policy.note_refused()
        return stored

    def _put_tagged(self, digests: Digests, expected: str | None, tags: Mapping[str, str] | None) -> tuple[str, int]:
        metadata = {"sha256": digests.sha256, UPLOAD_ID: self._upload_id}
        headers = properties(self._content_type, digests.md5, metadata, tags) | self._condition(expected)
        if self._whole is not None:
            return self._put_whole(self._whole, headers, expected)
        if not self._block_ids and not self._lost:
            with _content(self._block) as content:
                return self._writes.put(self._key, content, headers, self._lost_answers)
        if self._block.tell():
            self._stage()
        self._settle_all()
        if self._lost:
            raise BlocksLost
        return self._writes.commit(self._key, self._block_ids, headers, self._lost_answers)

    def _put_whole(self, content: RepeatableBody, headers: dict[str, str], expected: str | None) -> tuple[str, int]:
        try:
            return self._writes.put(self._key, content, headers, self._lost_answers)
        except PreconditionFailed:
            if expected is not None or self._exists():
                raise
        headers = {name: value for name, value in headers.items() if name != "If-None-Match"} | NOT_SINCE_1970
        return self._writes.put(self._key, content, headers, self._lost_answers)

    def _exists(self) -> bool:
        with contextlib.suppress(ObjectNotFound):
            self._reads.stat_with_metadata(self._key)
            return True
        return False

    def _condition(self, expected: str | None) -> dict[str, str]:
        """The headers that make a commit conditional.

        With ``If-None-Match: *``, Azurite takes uncommitted blocks for an object. So a commit that was refused for
        that, and is called again since there is none, has another condition that no object meets.
        """
        return NOT_SINCE_1970 if expected is None and self._refused_as_new else condition(expected)

    def _refuse_as_new(self) -> None:
        """There is a blob. The caller finds out which version to replace, unless it is none for other programs.

        :raises KeyConflict: it is another program's marker of a folder.
        """
        if self._refused_as_new:
            with contextlib.suppress(ObjectNotFound):
                if is_folder_marker(self._reads.headers(self._key)):
                    raise KeyConflict(
                        "another program keeps a folder of this name; use another one, or delete it there"
                    )
        self._refused_as_new = True

    def _landed(self) -> ObjectInfo | None:
        """The stored object, if a try of this commit whose answer was lost has stored it; None: it is another one."""
        try:
            info, headers = self._reads.stat_with_metadata(self._key)
        except ObjectNotFound:
            return None
        if headers.get(f"x-ms-meta-{UPLOAD_ID}") == self._upload_id:
            return info
        self._lost_answers.forget_if_older(headers)
        return None

    def _send_again(self, size: int, replay: Callable[[], Iterable[bytes]]) -> None:
        """Stage the content once more, with ids as others' blocks have them; or prepare to put it as a whole.

        :param size: of the content, in bytes.
        """
        self.abort()
        id_size = foreign_blocks.block_id_size(self._reads, self._key) or BLOCK_ID_SIZE
        self._begin(id_size)
        if id_size < foreign_blocks.MIN_ID_SIZE:
            self._whole = foreign_blocks.whole_content(size, replay)
            return
        for data in replay():
            self.write(data)

    def abort(self) -> None:
        while self._in_flight:
            self._in_flight.pop().cancel()
        self._spare.clear()
        self._block = io.BytesIO()


@contextlib.contextmanager
def _content(block: io.BytesIO) -> Iterator[memoryview]:
    """A buffer's content, for the duration of a ``with`` statement. The buffer cannot be written meanwhile."""
    with block.getbuffer() as whole, whole[: block.tell()] as content:
        yield content
