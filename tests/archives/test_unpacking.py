# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unpacking a compressed tar, and refusing one; pure, in tables."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import random
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kci_storage.archives.unpacking import (
    MAX_FRAMES,
    PIECE_SIZE,
    Limits,
    TarReader,
    compression,
    decompressed,
    pax_records,
    relative_name,
)
from kci_storage.errors import BadArchive

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
LIMITS = Limits(files=20, file_bytes=MIB, total_bytes=4 * MIB)
ZEROS = bytes(1024)  # a tar archive's end
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd.compress}
OPEN: dict[str, Callable[..., Any]] = {"gz": gzip.open, "xz": lzma.open, "zst": zstd.open}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def entry(name: str | bytes, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """An entry of a tar archive; the header's fields are those of tarfile, and may be false."""
    text = name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
    info = tarfile.TarInfo(text)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % 512)


def pax(*records: tuple[str, bytes], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header."""
    body = b""
    for name, value in records:
        rest = b" " + name.encode() + b"=" + value + b"\n"
        size = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
        body += str(size).encode() + rest
    return entry("pax", body, kind)


def pieces(data: bytes, size: int = 1000) -> Iterator[memoryview]:
    """The data as it may arrive, in one buffer that is reused."""
    buffer = bytearray(size)
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        buffer[:] = b"\xff" * size
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]


def unpack(data: bytes, filename: str = "", limits: Limits = LIMITS, size: int = 1000) -> list[tuple[str, bytes]]:
    """Unpack an archive; returns names and contents."""
    reader = TarReader(decompressed(pieces(data, size), filename), limits)
    return [(member.name, b"".join(map(bytes, reader.content()))) for member in reader]


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    """The reason for which an archive is refused."""
    with pytest.raises(BadArchive) as caught:
        unpack(data, "a.tar", limits)
    assert caught.value.message.isprintable()
    return caught.value.message


CONTENT = {
    "plain": b"content\n",
    "dir/empty": b"",
    "dir/sub/block": b"b" * 512,
    "dir/sub/more": bytes(range(256)) * 300,
    "dir/" + "long/" * 40 + "name-" * 30 + "x": b"long",
    "文/é.dtb": b"not ASCII",
}


def archive(format: int = tarfile.PAX_FORMAT, content: dict[str, bytes] = CONTENT) -> bytes:
    """An archive as Python's tarfile writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


# Accepted archives


@pytest.mark.parametrize("size", [1, 511, 1000, 1 << 20])
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_all_files_are_found_however_the_archive_arrives(format: str, size: int):
    assert dict(unpack(archive(FORMATS[format]), size=size)) == CONTENT


def test_names_of_ustar_that_stand_in_two_fields_are_one():
    content = {"a" * 80 + "/" + "b" * 90: b"x"}
    assert dict(unpack(archive(tarfile.USTAR_FORMAT, content))) == content


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_compression_is_known_by_the_content(suffix: str, size: int):
    assert dict(unpack(COMPRESS[suffix](archive()), "a.tar", size=size)) == CONTENT


@pytest.mark.parametrize("suffix", COMPRESS)
def test_frames_may_follow_each_other_and_be_padded(suffix: str):
    data, compress = archive(), COMPRESS[suffix]
    frames = [compress(data[:1000]), compress(b""), compress(data[1000:]), bytes(8)]
    assert dict(unpack(b"".join(frames))) == CONTENT
    assert dict(unpack(b"".join(frames), size=1)) == CONTENT


def test_zstd_may_begin_with_a_frame_to_be_skipped():
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert dict(unpack(skipped + zstd.compress(archive()) + skipped)) == CONTENT


@pytest.mark.parametrize("name", ["a.tar.gz", "A.TGZ", "a.tar.xz", "a.txz", "a.tar.zst", "a.tzst"])
def test_the_name_says_how_it_is_compressed_where_the_content_does_not(name: str):
    assert compression(b"what is this", name) is not None
    with pytest.raises(BadArchive, match="data is broken"):
        unpack(archive(), name)


@pytest.mark.parametrize("name", ["a.tar", "a", "", "a.gz/b.tar"])
def test_other_names_say_that_it_is_not_compressed(name: str):
    assert compression(b"what is this", name) is None
    assert dict(unpack(archive(), name)) == CONTENT


def test_an_archive_that_has_nothing_is_one():
    assert unpack(ZEROS) == []
    assert unpack(bytes(512)) == []
    assert unpack(bytes(10240)) == []


def test_contents_need_not_be_read():
    assert [member.name for member in TarReader(pieces(archive()), LIMITS)] == list(CONTENT)


def test_a_leading_dot_of_a_name_does_not_count():
    data = entry("./", kind=tarfile.DIRTYPE) + entry("./a", b"1") + entry("b/./c//d", b"2") + ZEROS
    assert unpack(data) == [("a", b"1"), ("b/c/d", b"2")]


def test_an_old_header_that_ends_in_a_slash_is_a_folder():
    assert unpack(entry("a/", kind=tarfile.AREGTYPE) + entry("b", b"1", tarfile.AREGTYPE) + ZEROS) == [("b", b"1")]


def test_extended_headers_hold_for_the_next_file_alone():
    data = pax(("path", b"first")) + entry("x", b"1") + entry("second", b"2") + ZEROS
    assert unpack(data) == [("first", b"1"), ("second", b"2")]
    data = pax(("path", b"folder")) + entry("x", kind=tarfile.DIRTYPE) + entry("second", b"2") + ZEROS
    assert unpack(data) == [("second", b"2")]


def test_a_size_in_an_extended_header_is_the_files():
    data = pax(("size", b"600")) + entry("a", b"x" * 600, size=0) + entry("b", b"2") + ZEROS
    assert unpack(data) == [("a", b"x" * 600), ("b", b"2")]


def test_a_comment_for_all_files_is_allowed_as_git_writes_it():
    data = pax(("comment", b"0123456789"), kind=tarfile.XGLTYPE) + entry("a", b"1") + ZEROS
    assert unpack(data) == [("a", b"1")]


def test_gnus_long_name_holds_for_the_next_file():
    name = b"n/" * 200 + b"x"
    data = entry("././@LongLink", name + b"\0", tarfile.GNUTYPE_LONGNAME) + entry("n", b"1") + entry("b") + ZEROS
    assert unpack(data) == [(name.decode(), b"1"), ("b", b"")]


# Refused archives


@pytest.mark.parametrize("name", ["/etc/passwd", "//a", "../a", "a/../b", "a/..", "..", "./../a"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("place", ["header", "pax", "gnu"])
def test_paths_that_lead_elsewhere_are_refused(name: str, kind: bytes, place: str):
    before = {
        "header": b"",
        "pax": pax(("path", name.encode())),
        "gnu": entry("././@LongLink", name.encode() + b"\0", tarfile.GNUTYPE_LONGNAME),
    }[place]
    data = entry("good", b"1") + before + entry(name if place == "header" else "x", kind=kind) + ZEROS
    assert "leads out of its folder" in refusal(data)


def test_messages_show_names_short_and_on_one_line():
    assert len(refusal(entry("a\n/../" + "b" * 90) + ZEROS)) < 200


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.GNUTYPE_LONGLINK, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"D", "neither a file nor a folder"),
        (b"M", "neither a file nor a folder"),
        (b"V", "neither a file nor a folder"),
        (b"Z", "neither a file nor a folder"),
        (b"\xff", "neither a file nor a folder"),
    ],
)
def test_other_entries_are_refused(kind: bytes, says: str):
    assert f"entry 'bad' is {says}" in refusal(entry("good", b"1") + entry("bad", kind=kind, linkname="good") + ZEROS)


@pytest.mark.parametrize("key", ["GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.name", "GNU.sparse.size"])
def test_sparse_files_of_pax_are_refused(key: str):
    assert "sparse" in refusal(pax((key, b"1")) + entry("a", b"1") + ZEROS)


@pytest.mark.parametrize("key", ["path", "linkpath", "size", "GNU.sparse.size"])
def test_a_global_header_must_not_change_files(key: str):
    assert f"global header that sets {key}" in refusal(pax((key, b"1"), kind=tarfile.XGLTYPE) + entry("a") + ZEROS)


@pytest.mark.parametrize("size", [b"-1", b"", b"1e3", b"0x10", b"9" * 20, b"\xb2"])
def test_sizes_that_make_no_sense_are_refused(size: bytes):
    assert "size makes no sense" in refusal(pax(("size", size)) + entry("a", b"1") + ZEROS)


def test_a_negative_size_is_refused():
    assert "size makes no sense" in refusal(entry("a", size=-512) + ZEROS)


def test_a_file_whose_name_ends_in_a_slash_is_refused():
    assert "ends in a slash" in refusal(entry("a/", b"1") + ZEROS)


@pytest.mark.parametrize(
    "body", [b"x", b"6 a=\n", b"3 =\n", b"99 path=a\n", b"9 path=ab", b"0 path=a\n", b"11 path=abc\n"]
)
def test_extended_headers_that_make_no_sense_are_refused(body: bytes):
    assert "extended header makes no sense" in refusal(entry("x", body, tarfile.XHDTYPE) + entry("a") + ZEROS)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [65 * 1024, 2**33, -1])
def test_long_extended_headers_are_refused_before_they_are_read(kind: bytes, size: int):
    assert "extended header that is too long" in refusal(entry("x", kind=kind, size=size))


def test_a_broken_header_is_not_the_end():
    first = entry("a", b"1")
    broken = bytearray(entry("b", b"2"))
    broken[0] ^= 1
    assert "a header makes no sense" in refusal(first + broken + ZEROS)
    assert refusal(bytes(broken) + ZEROS) == "the archive is not a tar archive"


@pytest.mark.parametrize("suffix", ["tar", *COMPRESS])
def test_an_archive_that_is_cut_short_anywhere_is_refused(suffix: str):
    data = COMPRESS.get(suffix, bytes)(archive(content={"a": b"1" * 700, "b/c": b"2"}).rstrip(b"\0") + bytes(1200))
    end = len(data) if suffix != "tar" else len(data.rstrip(b"\0")) + 512
    random.seed(1)
    for cut in {0, 1, 5, 6, 100, end - 1, *random.sample(range(end), 30)}:
        assert "cut short" in refusal(data[:cut]), cut


def test_an_extended_header_before_the_end_is_cut_short():
    assert "cut short" in refusal(entry("a") + pax(("path", b"b")) + ZEROS)


@pytest.mark.parametrize("suffix", ["tar", *COMPRESS])
def test_data_after_the_end_is_refused(suffix: str):
    compress = COMPRESS.get(suffix, bytes)
    assert "something after its end" in refusal(compress(archive() + b"garbage"))
    assert "something after its end" in refusal(compress(archive()) + compress(archive()))
    if suffix != "tar":
        assert "something else follows" in refusal(compress(archive()) + b"garbage that is longer")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_data_that_is_broken_is_refused(suffix: str):
    data = bytearray(COMPRESS[suffix](random.Random(1).randbytes(5000)))
    data[len(data) // 2] ^= 0xFF
    assert "broken" in refusal(bytes(data)) or "not a tar" in refusal(bytes(data))


# Limits


def test_the_limits_are_what_they_say():
    assert len(unpack(b"".join(entry(f"f{n}") for n in range(20)) + ZEROS)) == 20
    assert "more than 20 files" in refusal(b"".join(entry(f"f{n}") for n in range(21)) + ZEROS)
    assert len(unpack(entry("a", bytes(MIB)) + ZEROS)) == 1
    assert "file 'a' has more than 1.0 MiB" in refusal(entry("a", bytes(MIB + 1)) + ZEROS)
    full = b"".join(entry(f"f{n}", bytes(MIB)) for n in range(4))
    assert len(unpack(full + ZEROS)) == 4
    assert "more than 4.0 MiB" in refusal(full + entry("a", b"1") + ZEROS)


def test_a_file_is_refused_by_its_header():
    """Before the rest of it is received."""
    assert "has more than" in refusal(entry("a", size=2**40))
    assert "has more than" in refusal(pax(("size", b"9" * 19)) + entry("a"))


def test_the_same_name_again_counts_as_a_file():
    assert "more than 20 files" in refusal(entry("a") * 21 + ZEROS)


@pytest.mark.parametrize(
    "repeated",
    [entry("d", kind=tarfile.DIRTYPE), pax(("a", b"b")), pax(("a", b"b"), kind=tarfile.XGLTYPE)],
    ids=["folders", "extended", "global"],
)
def test_headers_without_files_are_limited(repeated: bytes):
    assert "headers" in refusal(repeated * (LIMITS.headers + 1) + ZEROS)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["file", "zeros after the end", "zeros before a header"])
def test_a_bomb_ends_at_the_limit_in_little_memory(suffix: str, kind: str):
    size = 40 * MIB
    head = {"file": entry("a", size=size), "zeros after the end": entry("a") + ZEROS}.get(kind, b"")
    bomb = io.BytesIO(compressed_zeros(suffix, head, size))
    reader = TarReader(decompressed(iter(lambda: bomb.read(64), b"")), LIMITS)
    tracemalloc.start()
    try:
        with pytest.raises(BadArchive, match="more than"):
            for _ in reader:
                pass
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 20 * MIB  # of which 8 are xz's own
    assert bomb.tell() < len(bomb.getvalue()) / 2


def compressed_zeros(suffix: str, head: bytes, size: int) -> bytes:
    """A number of zeros after a head, compressed."""
    file = io.BytesIO()
    with OPEN[suffix](file, "wb") as out:
        out.write(head)
        for _ in range(size // MIB):
            out.write(bytes(MIB))
    return file.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_pieces_are_small_however_well_they_are_compressed(suffix: str):
    sizes = [len(piece) for piece in decompressed([compressed_zeros(suffix, b"", 8 * MIB)])]
    assert sum(sizes) == 8 * MIB
    assert max(sizes) <= PIECE_SIZE


def test_compression_that_needs_much_memory_is_refused():
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 256 * MIB}]
    assert "128.0 MiB of memory" in refusal(lzma.compress(archive(), filters=filters))
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    assert "128.0 MiB of memory" in refusal(compressor.compress(archive()) + compressor.flush())


def test_the_strongest_usual_compression_is_taken():
    assert dict(unpack(lzma.compress(archive(), preset=9 | lzma.PRESET_EXTREME))) == CONTENT
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    assert dict(unpack(compressor.compress(archive()) + compressor.flush())) == CONTENT


def test_frames_are_counted():
    assert f"more than {MAX_FRAMES} parts" in refusal(zstd.compress(b"") * (MAX_FRAMES + 1))


# Against Python's own


def _is_plain(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and not name.endswith("/")


NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=200).filter(_is_plain)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(1, 2000),
)
def test_what_tarfile_writes_is_read_back(files: list[tuple[str, bytes]], format: int, size: int):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert unpack(file.getvalue(), size=size) == [(relative_name(name), content) for name, content in files]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(archive()) - 1), st.integers(1, 255), st.binary(max_size=40))
def test_a_changed_archive_is_read_or_refused(place: int, change: int, inserted: bytes):
    data = bytearray(archive())
    data[place] ^= change
    for changed in (bytes(data), bytes(data[:place]) + inserted + bytes(data[place:])):
        try:
            unpack(changed)
        except BadArchive as exc:
            assert exc.message.isprintable()


@given(st.binary(max_size=200))
def test_pax_records_are_read_or_refused(data: bytes):
    with contextlib.suppress(BadArchive):
        pax_records(data)
