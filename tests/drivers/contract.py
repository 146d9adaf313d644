# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every driver must do: the sentences of ``kci_storage/drivers/base.py`` as tests.

A driver's test class inherits :class:`DriverContract` and gives a fixture ``driver``; where it can, one whose blocks,
ranges and pages are small, so that a few hundred KiB are many of them::

    class TestMyDriver(DriverContract):
        @pytest.fixture
        def driver(self):
            driver = MyDriver(...)
            yield driver
            driver.close()
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from kci_storage import keys
from kci_storage.drivers.base import Digests, Driver, LocalObjects, ObjectInfo, ObjectReader, ObjectWriter
from kci_storage.drivers.guard import GuardedDriver
from kci_storage.errors import (
    BackendError,
    BadRequest,
    KeyConflict,
    ObjectChanged,
    ObjectNotFound,
    PreconditionFailed,
    WriteConflict,
)

KIB = 1024
SOME = 300 * KIB + 1  # bytes; several small blocks, and a last one that is not full

HOSTILE_KEYS = {
    "unicode": "küche/日本語/🙂.log",
    "decomposed": "u\u0308ber/e\u0301",
    "spaces": " a b /  c  /d ",
    "percent": "100%/%2F/%41/%zz/%25",
    "url": "a#b?c=d&e=f+g;h@i:j,k!l$m*n'o(p)",
    "quotes": "\"a\"/'b'/`c`",
    "markup": "<b>&amp;</b>/<!--/]]>",
    "hidden": ".hidden/..x/...y",
    "dots": "a.b/b..b/c...d",
    "tilde": "~/~root/a~",
    "brackets": "[a]/{b}/c|d^e",
    "bidirectional": "\u202egnp.exe\u2066",
    "a route's name below the top": "x/upload/metrics/v1",
    "a route's name as a folder": "upload/file",
    "looks internal": "kci/.kci/tmp",
    "longest": "abc" + "/".join(["🙂" * 63] * 16)[:1021],
    "longest in ASCII": "/".join(["x" * 255] * 4)[:1024],
    "most segments": "/".join("a" * 254),
    "longest segment": "y" * 255,
    "longest segment in UTF-8": "é" * 127 + "z",
    "like an option": "-rf",
    "like a drive": "C:/a",
    "like a URL": "http:/host",
}


def content_of(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two stretches are alike, so that any mix-up shows."""
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def digests_of(content: bytes) -> Digests:
    """What the server would have computed over an upload."""
    return Digests(len(content), hashlib.sha256(content).hexdigest(), hashlib.md5(content).digest())


def in_pieces(content: bytes, size: int = 50_000) -> Iterator[bytes]:
    """A content as it arrives."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


ANYTHING = "whatever is stored"  # no ETag


def etag_of(driver: Driver, key: str) -> str | None:
    """The ETag of the version that is stored; None: there is none."""
    with contextlib.suppress(ObjectNotFound):
        return driver.stat(key).etag
    return None


def delete(driver: Driver, key: str) -> None:
    """Delete an object, whichever version is stored."""
    driver.delete(key, etag_of(driver, key) or "none")


def put(
    driver: Driver,
    key: str,
    content: bytes,
    content_type: str = "application/octet-stream",
    expected: str | None = ANYTHING,
) -> ObjectInfo:
    """Store an object.

    :param expected: as for a commit; :data:`ANYTHING`: whichever version is stored.
    """
    digests = digests_of(content)
    with driver.writer(key, content_type) as writer:
        for piece in in_pieces(content):
            writer.write(piece)
        if expected is ANYTHING:
            return commit_over_anything(driver, key, writer, content)
        return writer.commit(digests, expected, replay=lambda: in_pieces(content))


def commit_over_anything(
    driver: Driver, key: str, writer: ObjectWriter, content: bytes, replay: bool = True
) -> ObjectInfo:
    """Commit, whichever version is stored, while others commit too."""
    expected = None
    for _ in range(20):
        try:
            return writer.commit(digests_of(content), expected, (lambda: in_pieces(content)) if replay else None)
        except PreconditionFailed:
            expected = etag_of(driver, key)
    raise AssertionError("the commit was refused again and again")


def content_from(reader: ObjectReader) -> bytes:
    """The rest of a reader, which is closed."""
    with reader:
        return b"".join(reader)


def get(driver: Driver, key: str, *args: Any, **kwargs: Any) -> bytes:
    """The content of an object, or a range of it."""
    return content_from(driver.read(key, *args, **kwargs))


def exists(driver: Driver, key: str) -> bool:
    """Whether there is such an object, by all ways of asking, which must agree."""
    answers = {key in listed(driver, prefix=key)}
    ways: list[Callable[[str], Any]] = [driver.stat, driver.read]
    for ask in [*ways, driver.open] if isinstance(driver, LocalObjects) else ways:
        try:
            answer = ask(key)
        except ObjectNotFound:
            answers.add(False)
        else:
            answers.add(True)
            if not isinstance(answer, ObjectInfo):
                os.close(answer[1]) if isinstance(answer, tuple) else answer.close()
    assert len(answers) == 1, f"not all ways of asking for {key} give the same answer"
    return answers.pop()


def pages(driver: Driver, **options: Any) -> Iterator[Any]:
    """All pages of a listing."""
    marker = None
    while True:
        page = driver.list(marker=marker, **options)
        yield page
        marker = page.next_marker
        if marker is None:
            return


def listed(driver: Driver, **options: Any) -> list[str]:
    """All keys of a listing, in its order."""
    return [info.key for page in pages(driver, **options) for info in page.objects]


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Call functions at the same time, and give what they returned or raised."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return function()
        except Exception as exc:  # noqa: BLE001  (the caller looks at it)
            return exc

    with ThreadPoolExecutor(len(functions)) as threads:
        return list(threads.map(run, functions))


class DriverContract:
    """The tests. Whatever one of them leaves is deleted at its end, after which nothing may be left."""

    def leftovers(self, driver: Driver) -> Iterable[str]:
        """What is found in the backend once every object is deleted, beyond the listing."""
        return ()

    def begin_read(self, driver: Driver, key: str) -> ObjectReader:
        """Begin to read the present version, while others write."""
        return driver.read(key)

    @pytest.fixture
    def production_driver(self, driver: Driver) -> Driver:
        """The same backend with the sizes that are used in production."""
        return driver

    @pytest.fixture(autouse=True)
    def nothing_is_left(self, driver: Driver) -> Iterator[None]:
        """Delete what a test has left, and look for more."""
        yield
        for key in listed(driver):
            delete(driver, key)
        assert listed(driver) == []
        assert sorted(self.leftovers(driver)) == []

    # Writing

    def test_nothing_is_visible_before_the_commit(self, driver: Driver) -> None:
        content = content_of(SOME)
        with driver.writer("folder/a", "text/plain") as writer:
            writer.write(content)
            assert not exists(driver, "folder/a")
            assert listed(driver) == []
            writer.commit(digests_of(content), None)
        assert exists(driver, "folder/a")
        assert get(driver, "folder/a") == content

    def test_the_previous_version_stays_until_the_commit(self, driver: Driver) -> None:
        old, new = content_of(1000, 1), content_of(SOME, 2)
        info = put(driver, "a", old)
        with driver.writer("a", "text/plain") as writer:
            writer.write(new)
            assert driver.stat("a") == info
            assert get(driver, "a") == old
            writer.commit(digests_of(new), info.etag)
        assert get(driver, "a") == new
        assert listed(driver) == ["a"]

    def test_tags_change_nothing_else(self, driver: Driver) -> None:
        content = content_of(SOME)
        with driver.writer("a", "text/plain", {"owner": "a_b.c", "kept for": "+-./:=_ 6m"}) as writer:
            writer.write(content)
            info = writer.commit(digests_of(content), None)
        assert (driver.stat("a"), get(driver, "a")) == (info, content)
        assert driver.list().objects[0].tags == info.tags

    @pytest.mark.parametrize("size", [0, 1, SOME])
    def test_an_aborted_upload_leaves_nothing(self, driver: Driver, size: int) -> None:
        writer = driver.writer("folder/a", "text/plain")
        writer.write(content_of(size))
        writer.abort()
        writer.abort()
        assert not exists(driver, "folder/a")

    @pytest.mark.parametrize("size", [1, SOME])
    def test_an_aborted_upload_leaves_the_previous_version(self, driver: Driver, size: int) -> None:
        info = put(driver, "a", b"previous", "text/plain")
        with pytest.raises(RuntimeError), driver.writer("a", "image/png") as writer:
            writer.write(content_of(size))
            raise RuntimeError("the client left")
        assert driver.stat("a") == info
        assert get(driver, "a") == b"previous"

    def test_flushed_at_any_time_it_holds_nothing_and_is_the_same(self, driver: Driver) -> None:
        content = content_of(SOME)
        with driver.writer("a", "text/plain") as writer:
            for piece in (content[:10], content[10:20], content[20:]):
                writer.write(piece)
                writer.flush()
                assert writer.held == 0
                assert not exists(driver, "a")
            writer.commit(digests_of(content), None)
        assert get(driver, "a") == content

    def test_a_deletion_names_the_version(self, driver: Driver) -> None:
        """Another machine may have replaced it meanwhile: that version is not deleted."""
        old = put(driver, "a", b"old")
        new = put(driver, "a", b"new")
        for wrong in (old.etag, "0123456789abcdef"):
            with pytest.raises(PreconditionFailed):
                driver.delete("a", wrong)
        assert get(driver, "a") == b"new"
        driver.delete("a", new.etag)
        assert not exists(driver, "a")

    def test_a_fenced_version_is_the_same_object(self, driver: Driver) -> None:
        info = put(driver, "a", b"content", "image/png")
        fenced = driver.fence("a", info.etag)
        if fenced is not None:  # else the backend cannot do this
            assert fenced == driver.stat("a") == replace(info, etag=fenced.etag, last_modified=fenced.last_modified)
            assert get(driver, "a", etag=fenced.etag) == b"content"
            assert put(driver, "a", b"next", expected=fenced.etag) == driver.stat("a")

    def test_only_the_named_version_is_fenced(self, driver: Driver) -> None:
        put(driver, "a", b"content")
        for key in ("a", "b"):
            with contextlib.suppress(ObjectNotFound, PreconditionFailed):
                assert driver.fence(key, "0123456789abcdef") is None, "the backend cannot do this"
        assert listed(driver) == ["a"]

    def test_abort_after_a_commit_does_nothing(self, driver: Driver) -> None:
        with driver.writer("a", "text/plain") as writer:
            writer.write(b"content")
            writer.commit(digests_of(b"content"), None)
            writer.abort()
        assert get(driver, "a") == b"content"

    @pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 131_072, SOME])
    def test_content_of_any_size_is_kept(self, driver: Driver, size: int) -> None:
        content = content_of(size)
        assert put(driver, "a", content).size == size
        assert get(driver, "a") == content
        assert driver.stat("a").size == size

    @pytest.mark.parametrize("size", [8 * KIB * KIB, 21 * KIB * KIB + 5])
    def test_a_large_object_is_kept(self, production_driver: Driver, size: int) -> None:
        content = content_of(size)
        put(production_driver, "large", content)
        assert get(production_driver, "large") == content
        assert get(production_driver, "large", size - 10, None) == content[-10:]

    @pytest.mark.parametrize("piece", [1000, 65_536, 100_000, SOME])
    def test_content_may_arrive_in_pieces_of_any_size(self, driver: Driver, piece: int) -> None:
        content = content_of(SOME)
        with driver.writer("a", "text/plain") as writer:
            writer.write(b"")
            for data in in_pieces(content, piece):
                writer.write(data)
            writer.commit(digests_of(content), None)
        assert get(driver, "a") == content

    def test_what_was_written_may_be_overwritten_by_its_owner(self, driver: Driver) -> None:
        content = content_of(SOME)
        buffer = bytearray(50_000)
        with driver.writer("a", "text/plain") as writer:
            for data in in_pieces(content, len(buffer)):
                buffer[: len(data)] = data
                writer.write(memoryview(buffer)[: len(data)])
            buffer[:] = bytes(len(buffer))
            writer.commit(digests_of(content), None)
        assert get(driver, "a") == content

    @pytest.mark.parametrize("size", [100, SOME])
    def test_a_commit_of_another_size_than_was_written_is_refused(self, driver: Driver, size: int) -> None:
        content = content_of(size)
        with GuardedDriver(driver).writer("a", "text/plain") as writer:
            writer.write(content[:-1])
            with pytest.raises(BackendError):
                writer.commit(digests_of(content), None, replay=lambda: in_pieces(content))
        assert not exists(driver, "a")

    # Properties

    @pytest.mark.parametrize("size", [0, 10, SOME])
    def test_properties_are_kept(self, driver: Driver, size: int) -> None:
        content = content_of(size)
        digests = digests_of(content)
        before = int(time.time())
        info = put(driver, "folder/a.txt", content, "text/plain; charset=utf-8")
        assert before - 1 <= info.last_modified <= time.time() + 1
        assert (info.key, info.size) == ("folder/a.txt", size)
        assert (info.content_type, info.sha256) == ("text/plain; charset=utf-8", digests.sha256)
        assert info.md5 == (digests.md5 if driver.wants_md5 else info.md5)
        assert driver.stat("folder/a.txt") == info
        with driver.read("folder/a.txt") as reader:
            assert reader.info == info

    def test_an_etag_is_bare_and_each_version_has_another_one(self, driver: Driver) -> None:
        etags = [put(driver, "a", content_of(size)).etag for size in (0, 5, 5 + SOME)]
        etags.append(put(driver, "a", content_of(5, seed=9)).etag)
        assert len(set(etags)) == 4
        assert all(etag and not set(etag) & set('", \\') and not etag.startswith("W/") for etag in etags)

    def test_the_type_of_the_latest_version_counts(self, driver: Driver) -> None:
        put(driver, "a", b"same", "text/plain")
        put(driver, "a", b"same", "image/png")
        assert driver.stat("a").content_type == "image/png"
        with driver.read("a") as reader:
            assert reader.info.content_type == "image/png"

    def test_local_objects_are_given_with_their_properties(self, driver: Driver) -> None:
        if not isinstance(driver, LocalObjects):
            return  # it does not claim the ability
        content = content_of(SOME)
        expected = put(driver, "folder/a", content, "text/plain")
        info, fd = driver.open("folder/a")
        with open(fd, "rb") as file:
            assert info == expected
            assert file.read() == content
        with pytest.raises(ObjectNotFound):
            driver.open("folder/b")

    # Conditions

    @pytest.mark.parametrize("size", [10, SOME])
    def test_a_commit_that_expects_nothing_replaces_nothing(self, driver: Driver, size: int) -> None:
        first = put(driver, "a", content_of(size, 1), expected=None)
        with pytest.raises(PreconditionFailed):
            put(driver, "a", content_of(size, 2), expected=None)
        assert driver.stat("a") == first
        assert get(driver, "a") == content_of(size, 1)

    @pytest.mark.parametrize("size", [10, SOME])
    def test_a_commit_that_expects_a_version_replaces_only_that(self, driver: Driver, size: int) -> None:
        first = put(driver, "a", content_of(size, 1))
        second = put(driver, "a", content_of(size, 2), expected=first.etag)
        with pytest.raises(PreconditionFailed):
            put(driver, "a", content_of(size, 3), expected=first.etag)
        assert driver.stat("a") == second
        assert get(driver, "a") == content_of(size, 2)

    @pytest.mark.parametrize("expected", ["0123456789abcdef", "0x8DC1234567890AB", "made-up", "*"])
    def test_a_version_that_never_was_is_not_there(self, driver: Driver, expected: str) -> None:
        with pytest.raises(PreconditionFailed):
            put(driver, "a", b"content", expected=expected)
        assert not exists(driver, "a")
        put(driver, "a", b"there")
        with pytest.raises(PreconditionFailed):
            put(driver, "a", b"content", expected=expected)
        assert get(driver, "a") == b"there"

    @pytest.mark.parametrize("size", [10, SOME])
    def test_a_commit_may_be_tried_again_with_another_expectation(self, driver: Driver, size: int) -> None:
        there = put(driver, "a", b"there")
        content = content_of(size)
        with driver.writer("a", "text/plain") as writer:
            writer.write(content)
            for wrong in (None, "0123456789abcdef", None):
                with pytest.raises(PreconditionFailed):
                    writer.commit(digests_of(content), wrong)
                assert driver.stat("a") == there
            info = writer.commit(digests_of(content), there.etag)
        assert driver.stat("a") == info
        assert get(driver, "a") == content

    def test_only_one_of_several_writers_that_expect_nothing_gets_through(self, driver: Driver) -> None:
        def write(number: int) -> int:
            put(driver, "a", content_of(SOME, number), expected=None)
            return number

        results = at_once(*(lambda number=number: write(number) for number in range(4)))
        won = [result for result in results if isinstance(result, int)]
        assert len(won) == 1, results
        assert all(isinstance(result, (int, PreconditionFailed, WriteConflict)) for result in results), results
        assert get(driver, "a") == content_of(SOME, won[0])

    # Reading

    def test_a_range_is_exactly_that(self, driver: Driver) -> None:
        content = content_of(SOME)
        put(driver, "a", content)
        starts = [0, 1, 65_535, 65_536, 131_071, 200_000, SOME - 1, SOME, SOME + 1, 10 * SOME]
        for start, length in itertools.product(starts, [0, 1, 65_536, 65_537, 150_000, SOME, None]):
            stop = None if length is None else start + length
            with driver.read("a", start, stop) as reader:
                assert reader.info.size == SOME
                assert b"".join(reader) == content[start:stop], (start, stop)

    @pytest.mark.parametrize("bounds", [(0, None), (0, 0), (0, 1), (0, 100), (1, None), (5, 9), (9, 5)])
    def test_ranges_of_an_empty_object_are_empty(self, driver: Driver, bounds: tuple[int, int | None]) -> None:
        info = put(driver, "empty", b"")
        with driver.read("empty", *bounds) as reader:
            assert reader.info == info
            assert list(reader) == []

    def test_the_properties_are_those_of_the_whole_whatever_the_range(self, driver: Driver) -> None:
        info = put(driver, "a", content_of(SOME), "text/plain")
        for bounds in [(0, None), (0, 10), (SOME - 1, None), (SOME, None), (7, 7)]:
            with driver.read("a", *bounds) as reader:
                assert reader.info == info

    def test_pieces_are_neither_empty_nor_large(self, production_driver: Driver) -> None:
        put(production_driver, "a", content_of(20 * KIB * KIB))
        with production_driver.read("a") as reader:
            assert all(0 < len(piece) <= 8 * KIB * KIB for piece in reader)

    def test_a_version_can_be_asked_for(self, driver: Driver) -> None:
        old = put(driver, "a", content_of(SOME, 1))
        assert get(driver, "a", etag=old.etag) == content_of(SOME, 1)
        assert get(driver, "a", 10, 70_000, etag=old.etag) == content_of(SOME, 1)[10:70_000]
        put(driver, "a", content_of(SOME, 2))
        for bounds in [(), (10, 20), (SOME,), (0, 0)]:
            with pytest.raises(ObjectChanged):
                get(driver, "a", *bounds, etag=old.etag)
        with pytest.raises(ObjectNotFound):
            get(driver, "b", etag=old.etag)

    @pytest.mark.parametrize("newer_size", [10, SOME, 2 * SOME])
    def test_a_read_never_mixes_versions(self, driver: Driver, newer_size: int) -> None:
        old = content_of(SOME, 1)
        put(driver, "a", old)
        with driver.read("a") as reader:
            pieces = iter(reader)
            content = next(pieces)
            put(driver, "a", content_of(newer_size, 2))
            with contextlib.suppress(ObjectChanged):
                content += b"".join(pieces)
                assert content == old
        assert old.startswith(content)

    def test_a_read_of_what_is_deleted_ends_rightly_or_fails(self, driver: Driver) -> None:
        content = content_of(SOME)
        put(driver, "a", content)
        with driver.read("a") as reader:
            pieces = iter(reader)
            got = next(pieces)
            delete(driver, "a")
            with contextlib.suppress(BackendError):
                got += b"".join(pieces)
                assert got == content
        assert content.startswith(got)

    def test_readers_among_writers_get_one_version_each(self, driver: Driver) -> None:
        versions = {hashlib.sha256(content_of(SOME + n, n)).hexdigest(): content_of(SOME + n, n) for n in range(3)}
        put(driver, "a", content_of(SOME, 0))
        written = threading.Event()

        def write() -> None:
            try:
                for number in (1, 2, 0) * 4:
                    put(driver, "a", content_of(SOME + number, number))
            finally:
                written.set()

        def read() -> int:
            whole = 0
            while not written.is_set():
                with contextlib.suppress(ObjectChanged), self.begin_read(driver, "a") as reader:
                    content = b"".join(reader)
                    assert content == versions[str(reader.info.sha256)]
                    assert reader.info.size == len(content)
                    whole += 1
            return whole

        results = at_once(write, read, read)
        assert not [result for result in results if isinstance(result, Exception)], results

    def test_a_reader_may_be_closed_early_and_twice(self, driver: Driver) -> None:
        put(driver, "a", content_of(SOME))
        reader = driver.read("a")
        next(iter(reader))
        reader.close()
        reader.close()
        driver.read("a").close()

    # Writers beside each other

    def test_the_result_of_writers_at_once_is_wholly_ones(self, driver: Driver) -> None:
        def write(number: int) -> int:
            put(driver, "folder/a", content_of(SOME + number, number), f"x/{number}")
            return number

        results = at_once(*(lambda number=number: write(number) for number in range(5)))
        stored = [result for result in results if isinstance(result, int)]
        assert stored, results
        assert all(isinstance(result, (int, WriteConflict)) for result in results), results
        info = driver.stat("folder/a")
        number = info.size - SOME
        assert number in stored
        assert get(driver, "folder/a") == content_of(SOME + number, number)
        assert (info.content_type, info.sha256) == (f"x/{number}", digests_of(content_of(info.size, number)).sha256)

    @pytest.mark.parametrize("other_size", [10, SOME])
    def test_a_writer_that_another_one_overtakes_is_wholly_stored_or_refused(
        self, driver: Driver, other_size: int
    ) -> None:
        ours, other = content_of(SOME, 1), content_of(other_size, 2)
        with driver.writer("a", "text/plain") as writer:
            writer.write(ours[:200_000])
            put(driver, "a", other)
            writer.write(ours[200_000:])
            try:
                commit_over_anything(driver, "a", writer, ours)
            except WriteConflict:
                ours = other
        assert get(driver, "a") == ours
        assert driver.stat("a").sha256 == digests_of(ours).sha256

    def test_many_threads_may_use_it(self, driver: Driver) -> None:
        def work(number: int) -> None:
            key, content = f"shared/{number % 3}/{number}", content_of(70_000, number)
            put(driver, key, content)
            assert get(driver, key) == content
            assert key in listed(driver, prefix="shared/")
            delete(driver, key)

        assert at_once(*(lambda number=number: work(number) for number in range(8))) == [None] * 8

    # Deleting

    def test_a_deleted_object_is_gone(self, driver: Driver) -> None:
        put(driver, "folder/a", b"1")
        put(driver, "folder/b", b"2")
        delete(driver, "folder/a")
        assert not exists(driver, "folder/a")
        assert listed(driver) == ["folder/b"]
        with pytest.raises((ObjectNotFound, PreconditionFailed)):
            delete(driver, "folder/a")

    def test_a_deleted_object_can_be_stored_again(self, driver: Driver) -> None:
        put(driver, "a", b"first", "text/plain")
        delete(driver, "a")
        info = put(driver, "a", b"first", "image/png", expected=None)
        assert info.content_type == driver.stat("a").content_type == "image/png"

    def test_what_was_overwritten_does_not_come_back(self, driver: Driver) -> None:
        put(driver, "a", b"first")
        put(driver, "a", content_of(SOME))
        delete(driver, "a")
        assert not exists(driver, "a")

    # What is not there

    @pytest.mark.parametrize("key", ["nothing", "no/such/file", "there/below", "the", "the/folder", "therefore"])
    def test_what_is_not_there_is_not_found(self, driver: Driver, key: str) -> None:
        put(driver, "there", b"a file")
        put(driver, "the/folder/file", b"in a folder")
        for ask in (driver.stat, driver.read):
            with pytest.raises(ObjectNotFound):
                ask(key)
        with pytest.raises((ObjectNotFound, PreconditionFailed)):
            driver.delete(key, "etag")
        assert get(driver, "there") == b"a file"
        assert get(driver, "the/folder/file") == b"in a folder"

    @pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a"), ("a", "a/b/c")])
    def test_keys_that_exclude_each_other_are_both_kept_or_one_is_refused(
        self, driver: Driver, first: str, second: str
    ) -> None:
        info = put(driver, first, b"first")
        try:
            put(driver, second, b"second")
        except KeyConflict as exc:
            assert "a" in exc.message
            assert listed(driver) == [first]
        else:
            assert get(driver, second) == b"second"
        assert driver.stat(first) == info
        assert get(driver, first) == b"first"

    def test_a_key_takes_the_place_of_a_folder_that_has_become_empty(self, driver: Driver) -> None:
        put(driver, "a/b/c", b"1")
        delete(driver, "a/b/c")
        put(driver, "a", b"2")
        assert listed(driver) == ["a"]

    # Listing

    @pytest.fixture
    def tree(self, driver: Driver) -> dict[str, ObjectInfo]:
        """Some dozens of objects whose order is not that of their folders."""
        names = ["a-", "a.txt", "a/b", "a/b.c", "a/bc/1", "a/bc/2", "a/bd", "a0", "B", "ab/c/d/e", "z z", "é"]
        names += ["日本/x"]
        names += [f"many/{number:03}" for number in range(25)] + [f"wide/{number}/x" for number in range(12)]
        return {name: put(driver, name, name.encode()) for name in names}

    def test_an_empty_store_has_one_empty_page(self, driver: Driver) -> None:
        for delimiter in ("", "/"):
            page = driver.list(delimiter=delimiter)
            assert (page.objects, page.folders, page.next_marker) == ((), (), None)

    @pytest.mark.parametrize("details", [True, False])
    def test_each_object_is_listed_once_over_all_pages(
        self, driver: Driver, tree: dict[str, ObjectInfo], details: bool
    ) -> None:
        assert sorted(listed(driver, details=details)) == sorted(tree)

    def test_a_listing_tells_what_a_look_at_each_object_tells(
        self, driver: Driver, tree: dict[str, ObjectInfo]
    ) -> None:
        for page in pages(driver):
            for info in page.objects:
                seen = tree[info.key]
                assert (info.size, info.etag, info.last_modified) == (seen.size, seen.etag, seen.last_modified)

    def test_a_prefix_is_plain_text(self, driver: Driver, tree: dict[str, ObjectInfo]) -> None:
        for prefix in ["a", "a/", "a/b", "a/bc", "a/bc/", "many/01", "z ", "é", "日", "B", "ab/c/d/e", "a/b.c"]:
            expected = sorted(key for key in tree if key.startswith(prefix))
            assert expected
            for details in (True, False):
                assert sorted(listed(driver, prefix=prefix, details=details)) == expected, prefix

    def test_a_prefix_that_no_key_has_gives_nothing(self, driver: Driver, tree: dict[str, ObjectInfo]) -> None:
        absent = ["nothing", "A", "B/", "many/001/", "%", "<", "&", "x" * 300, "x" * 5000]
        impossible = ["a/b/", "a//", "/", "/a", "../", "./", ".", "..", "many/../a", ".kci", ".kci/", "\\"]
        impossible += ["\x00", "a\x01", "\x7f", "\ud800", "a\n", "\x00/", "\ud800/a"]
        for prefix, delimiter in itertools.product(absent + impossible, ("", "/")):
            for page in pages(GuardedDriver(driver), prefix=prefix, delimiter=delimiter):
                assert (page.objects, page.folders) == ((), ()), prefix

    def test_a_delimiter_gives_one_level(self, driver: Driver, tree: dict[str, ObjectInfo]) -> None:
        for prefix in ["", "a/", "a", "a/b", "ab/", "ab/c/", "many/", "wide/", "wide/1", "w"]:
            levels = [key[: end + 1] if (end := key.find("/", len(prefix))) >= 0 else key for key in tree]
            expected = {level for level in levels if level.startswith(prefix)}
            found = [
                name
                for page in pages(driver, prefix=prefix, delimiter="/")
                for name in [*page.folders, *(info.key for info in page.objects)]
            ]
            assert sorted(found) == sorted(expected), prefix

    def test_a_page_may_be_asked_for_again(self, driver: Driver, tree: dict[str, ObjectInfo]) -> None:
        choices: list[dict[str, Any]] = [{}, {"delimiter": "/"}, {"prefix": "many/"}]
        for options in choices:
            for page in pages(driver, **options):
                if page.next_marker is not None:
                    marker = page.next_marker
                    assert driver.list(marker=marker, **options) == driver.list(marker=marker, **options)

    def test_a_made_up_marker_gives_a_page_or_is_refused(self, driver: Driver, tree: dict[str, ObjectInfo]) -> None:
        for marker in ["", "made up", "%%%", "\x01", "\ud800", "zzzz", "../", "a" * 2000]:
            with contextlib.suppress(BadRequest):
                assert {info.key for info in driver.list(marker=marker).objects} <= set(tree), marker

    @pytest.mark.parametrize("details", [True, False])
    def test_what_changes_between_pages_does_not_hide_the_rest(
        self, driver: Driver, tree: dict[str, ObjectInfo], details: bool
    ) -> None:
        for number in range(5):
            put(driver, f"many/{number:03}-gone", b"")
        found = []
        for number, page in enumerate(pages(driver, details=details)):
            found += [info.key for info in page.objects]
            if number < 5:
                delete(driver, f"many/{number:03}-gone")
                put(driver, f"many/{number:03}-new", b"")
                put(driver, "many/007", b"replaced, and there all the while")
        assert sorted(key for key in found if key in tree) == sorted(tree)

    # Keys

    @pytest.mark.parametrize("key", HOSTILE_KEYS.values(), ids=HOSTILE_KEYS)
    def test_a_valid_key_works_whatever_it_looks_like(self, driver: Driver, key: str) -> None:
        assert keys.is_valid(key)
        put(driver, "another", b"another")
        content = content_of(70_000)
        info = put(driver, key, content[:10], "text/plain")
        info = put(driver, key, content, "text/plain", expected=info.etag)
        assert exists(driver, key)
        assert driver.stat(key) == info
        assert get(driver, key, 5, 66_000) == content[5:66_000]
        assert sorted(listed(driver)) == sorted([key, "another"])
        top = {name for page in pages(driver, delimiter="/") for name in page.folders}
        assert top == ({key.partition("/")[0] + "/"} if "/" in key else set())
        delete(driver, key)
        assert not exists(driver, key)

    def test_keys_that_look_alike_are_different(self, driver: Driver) -> None:
        alike = ["a b", "a+b", "a%20b", "a%2520b", "A B", "a  b", "é", "e\u0301", "a", ".a", "..a", "%61"]
        for key in alike:
            put(driver, key, key.encode())
        assert {key: get(driver, key) for key in alike} == {key: key.encode() for key in alike}
        assert sorted(listed(driver)) == sorted(alike)

    # The driver itself

    def test_a_backend_that_serves_passes_the_probe(self, driver: Driver) -> None:
        driver.probe()

    def test_it_may_be_closed_twice(self, driver: Driver) -> None:
        put(driver, "a", b"content")
        driver.close()
        driver.close()
