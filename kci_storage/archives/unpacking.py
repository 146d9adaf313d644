# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unpacking a compressed tar while it is received. Pure: pieces of bytes in, files' names and contents out.

No size in an archive is trusted before it is checked. A piece of unpacked data has at most :data:`PIECE_SIZE` bytes,
however well it was compressed, and the limits are checked with each header: a decompression bomb costs no more than
the limits allow. ``tarfile`` parses the headers' blocks. The blocks between them are read here, since ``tarfile``
takes a broken header for the archive's end, and reads extended headers of any size into memory.
"""

from __future__ import annotations

import lzma
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from kci_storage.errors import BadArchive
from kci_storage.http.sizes import readable_size

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_SIZE = 256 * 1024  # bytes that are unpacked at a time, at most
MAX_MEMORY = 128 * 1024 * 1024  # bytes that unpacking may need: `xz -9` needs 65 MiB, `zstd --ultra -22` this much
ZSTD_WINDOW_LOG = MAX_MEMORY.bit_length() - 1
MAX_EXTENSION_SIZE = 64 * 1024  # bytes of one extended header: a path, and extended attributes
HEADERS_PER_FILE = 8  # that an archive may have on average, those of folders and extended headers included
SPARE_HEADERS = 1_000
MAX_FRAMES = 100_000  # of compressed data; each costs some microseconds, even if it is empty
BLOCK = tarfile.BLOCKSIZE  # bytes

_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # RFC 8878, 3.1.2; pzstd begins with one
_SUFFIXES = {"gz": "gzip", "tgz": "gzip", "xz": "xz", "txz": "xz", "zst": "zstd", "tzst": "zstd"}
_MAX_MAGIC_SIZE = 6  # bytes
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]+)=")  # of a pax header: its length, its name
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FORBIDDEN = {
    tarfile.LNKTYPE: "a link",
    tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Limits:
    """How large an archive may be, unpacked."""

    files: int
    file_bytes: int
    total_bytes: int

    @property
    def headers(self) -> int:
        """How many headers it may have."""
        return SPARE_HEADERS + HEADERS_PER_FILE * self.files

    @property
    def unpacked(self) -> int:
        """How many bytes it may have unpacked, headers and padding included."""
        return self.total_bytes + 4 * BLOCK * self.headers


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive."""

    name: str  # relative, without "." and ".."
    size: int  # bytes


# Decompression


class _Decompressor(Protocol):
    """Decompresses one frame. The decompressor objects of ``lzma`` and ``zstd`` have these members."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether no more output can be had without further input."""

    @property
    def unused_data(self) -> bytes:
        """The input after the frame's end."""

    def decompress(self, data: Any, max_length: int) -> bytes:
        """The next bytes, at most ``max_length``."""


class _Gzip:
    """Decompresses one gzip member, as a :class:`_Decompressor`."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: Piece, max_length: int) -> bytes:
        piece = self._inner.decompress(self._inner.unconsumed_tail or data, max_length)
        self.needs_input = len(piece) < max_length and not self._inner.unconsumed_tail
        return piece


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY)


def _zstd() -> _Decompressor:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    decompressor: _Decompressor = zstd.ZstdDecompressor(options=options)
    return decompressor


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {"gzip": _Gzip, "xz": _xz, "zstd": _zstd}


def decompressed(pieces: Iterable[Piece], filename: str = "") -> Iterator[Piece]:
    """Decompress an archive; one that is not compressed is returned as it is.

    :param pieces: the archive. No piece is used after the next one was asked for.
    :param filename: its suffix tells the compression where the content does not.
    :returns: the unpacked content, in pieces.
    :raises BadArchive: the data is broken, is cut short, or needs more than :data:`MAX_MEMORY`.
    """
    rest = iter(pieces)
    head = b""
    while len(head) < _MAX_MAGIC_SIZE and (piece := next(rest, None)) is not None:
        head += piece
    kind = compression(head, filename)
    begun = chain((head,), rest)
    return begun if kind is None else _unpacked(begun, kind)


def compression(head: bytes, filename: str) -> str | None:
    r"""How an archive is compressed: told by its first bytes, else by its name; None: it is not.

    >>> compression(b"\x1f\x8b\x08\x00\x00\x00", "a.tar"), compression(b"a/b/c\x00", "a.tar")
    ('gzip', None)
    """
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if _ZSTD_SKIPPABLE.match(head):
        return "zstd"
    return _SUFFIXES.get(filename.lower().rpartition(".")[2])


def _unpacked(pieces: Iterable[Piece], kind: str) -> Iterator[bytes]:
    try:
        yield from _frames(pieces, _DECOMPRESSORS[kind])
    except lzma.LZMAError as exc:
        if "limit" in str(exc):
            raise _too_much_memory() from None
        raise _broken(kind) from None
    except zstd.ZstdError as exc:
        if "memory" in str(exc):
            raise _too_much_memory() from None
        raise _broken(kind) from None
    except zlib.error:
        raise _broken(kind) from None


def _frames(pieces: Iterable[Piece], new: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """The content of concatenated frames, with zeros after each: the tools of all three formats allow both."""
    frame, begun, ended = new(), False, 0
    for data in pieces:
        while data or (begun and not frame.needs_input):
            if not begun and not (data := bytes(data).lstrip(b"\0")):
                break
            piece, data, begun = frame.decompress(data, PIECE_SIZE), b"", True
            if piece:
                yield piece
            if frame.eof:
                data, frame, begun, ended = frame.unused_data, new(), False, ended + 1
                if ended == MAX_FRAMES:
                    raise BadArchive(f"the archive's compressed data has more than {MAX_FRAMES} parts")
    if begun:
        raise _cut_short()


def _broken(kind: str) -> BadArchive:
    return BadArchive(f"the archive's {kind} data is broken, or something else follows it")


def _cut_short() -> BadArchive:
    return BadArchive("the archive is cut short")


def _too_much_memory() -> BadArchive:
    return BadArchive(
        f"unpacking the archive needs more than {readable_size(MAX_MEMORY)} of memory: compress it less"
    )


# tar


class TarReader:
    """The regular files of a tar archive, one after another. Folders are skipped; other entries are refused.

    The archive is read to the last byte: only zeros may follow its end.

    :param pieces: the archive, as :func:`decompressed` returns it.
    """

    def __init__(self, pieces: Iterable[Piece], limits: Limits):
        self._pieces = iter(pieces)
        self._limits = limits
        self._rest = memoryview(b"")  # of the current piece
        self._unpacked = 0  # bytes taken from the pieces
        self._headers = self._files = 0
        self._total = 0  # bytes in all files so far
        self._left = 0  # bytes of the current file that are still to be read

    def __iter__(self) -> Iterator[Member]:
        """Each file; :meth:`content` may be read before the next file is asked for.

        :raises BadArchive: the archive is broken, cut short or too large, or has an entry that cannot be stored.
        """
        extended: dict[str, bytes] = {}
        while (header := self._header()) is not None:
            if header.type in _EXTENDED or header.type == tarfile.GNUTYPE_LONGNAME:
                extended |= self._extension(header)
                continue
            if header.type == tarfile.XGLTYPE:
                self._check_global(header)
                continue
            if (member := self._member(header, extended)) is not None:
                yield member
                for _ in self.content():  # skip what the caller did not read
                    pass
                self._skip_padding(member.size)
            extended = {}
        if extended:
            raise _cut_short()
        self._check_end()

    def content(self) -> Iterator[memoryview]:
        """The current file's content, in pieces, each valid until the next one is asked for."""
        while self._left:
            piece = self._take(self._left)
            self._left -= len(piece)
            yield piece

    # Reading

    def _take(self, max_size: int) -> memoryview:
        """The next bytes, at least one, at most ``max_size``."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                raise _cut_short()
            self._unpacked += len(piece)
            if self._unpacked > self._limits.unpacked:
                raise self._too_large()
            self._rest = memoryview(piece)
        taken, self._rest = self._rest[:max_size], self._rest[max_size:]
        return taken

    def _read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        data = bytearray()
        while len(data) < size:
            data += self._take(size - len(data))
        return bytes(data)

    def _skip_padding(self, size: int) -> None:
        self._read(-size % BLOCK)

    def _check_end(self) -> None:
        """Check that only zeros follow the end: a second archive there would be ignored silently."""
        for piece in chain((self._rest,), self._pieces):
            self._unpacked += len(piece)
            if self._unpacked > self._limits.unpacked:
                raise self._too_large()
            if bytes(piece).strip(b"\0"):
                raise BadArchive("the archive has something after its end; archives cannot be joined by `cat`")

    # Headers

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None: the archive's end."""
        self._headers += 1
        if self._headers > self._limits.headers:
            raise BadArchive(f"the archive has more than {self._limits.headers} headers")
        block = self._read(BLOCK)
        if not any(block):
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            what = "is not a tar archive" if self._headers == 1 else "is broken: a header makes no sense"
            raise BadArchive(f"the archive {what}") from None

    def _extension(self, header: tarfile.TarInfo) -> dict[str, bytes]:
        """The records of an extended header, which describe the entry after it."""
        if not 0 <= header.size <= MAX_EXTENSION_SIZE:
            raise BadArchive("the archive has an extended header that is too long")
        data = self._read(header.size)
        self._skip_padding(header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.partition(b"\0")[0]}
        return pax_records(data)

    def _check_global(self, header: tarfile.TarInfo) -> None:
        """Check that a global header sets no name or size; a comment, such as that of git, is allowed."""
        for name in self._extension(header):
            if name in ("path", "linkpath", "size") or name.startswith("GNU.sparse."):
                raise BadArchive(f"the archive has a global header that sets {name}")

    def _member(self, header: tarfile.TarInfo, extended: dict[str, bytes]) -> Member | None:
        """The file of a header; None: a folder."""
        raw = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else header.name
        is_folder = header.type == tarfile.DIRTYPE or (header.type == tarfile.AREGTYPE and raw.endswith("/"))
        name = relative_name(raw)
        if is_folder:
            return None
        if header.type not in _REGULAR:
            what = _FORBIDDEN.get(header.type, "neither a file nor a folder")
            raise BadArchive(f"the archive's entry {shown(raw)} is {what}: only regular files can be stored")
        if any(key.startswith("GNU.sparse.") for key in extended):
            raise BadArchive(f"the archive's entry {shown(raw)} is a sparse file: only regular files can be stored")
        if raw.endswith("/"):
            raise BadArchive(f"the archive's entry {shown(raw)} is a file whose name ends in a slash")
        return self._counted(Member(name, _size(header, extended)))

    def _counted(self, member: Member) -> Member:
        """The same file, counted and checked against the limits."""
        self._files += 1
        self._total += member.size
        self._left = member.size
        if self._files > self._limits.files:
            raise BadArchive(f"the archive has more than {self._limits.files} files")
        if member.size > self._limits.file_bytes:
            limit = readable_size(self._limits.file_bytes)
            raise BadArchive(f"the archive's file {shown(member.name)} has more than {limit}")
        if self._total > self._limits.total_bytes:
            raise self._too_large()
        return member

    def _too_large(self) -> BadArchive:
        return BadArchive(f"the archive has more than {readable_size(self._limits.total_bytes)}, unpacked")


def relative_name(name: str) -> str:
    """The name of a tar entry, relative to the archive's folder, without the ``.`` segments of `tar -c .`.

    :raises BadArchive: the name is absolute, or has a ``..`` segment.

    >>> relative_name("./dtbs//arm/a.dtb")
    'dtbs/arm/a.dtb'
    """
    segments = name.split("/")
    if name.startswith("/") or ".." in segments:
        raise BadArchive(f"the archive's entry {shown(name)} leads out of its folder")
    return "/".join(segment for segment in segments if segment not in ("", "."))


def pax_records(data: bytes) -> dict[str, bytes]:
    r"""The records of a pax extended header (POSIX.1-2017, pax, "pax Header Block").

    :raises BadArchive: the header is malformed.

    >>> pax_records(b"14 path=a/\xe6\x96\x87\n")
    {'path': b'a/\xe6\x96\x87'}
    """
    records = {}
    position = 0
    while position < len(data):
        match = _RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            raise BadArchive("the archive is broken: an extended header makes no sense")
        records[match[2].decode("utf-8", "replace")] = data[match.end() : end - 1]
        position = end
    return records


def _size(header: tarfile.TarInfo, extended: dict[str, bytes]) -> int:
    """The size of a file's content, in bytes."""
    text = extended.get("size")
    size = header.size if text is None else int(text) if re.fullmatch(rb"[0-9]{1,19}", text) else -1
    if size < 0:
        raise BadArchive("the archive is broken: a file's size makes no sense")
    return size


def shown(name: str) -> str:
    r"""A name as it is shown in a message: short, and on one line.

    >>> shown("a\n")
    "'a\\n'"
    """
    return ascii(name if len(name) <= 80 else f"{name[:79]}…")
