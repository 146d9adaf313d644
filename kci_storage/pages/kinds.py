# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kind of a file, by its name, which a directory page shows as a mark beside it. Pure.

The content type does not tell it: a kernel, a device tree and a module are all ``application/octet-stream``.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple


class Kind(enum.Enum):
    """The kind of a file; the value is the name of the page's mark."""

    ARCHIVE = "archive"
    CONFIG = "config"
    DEVICE_TREE = "dtb"
    DISK = "disk"
    KERNEL = "kernel"
    OTHER = "other"
    PACKAGE = "package"
    PATCH = "patch"
    PICTURE = "picture"
    TEXT = "text"


class Mark(NamedTuple):
    """A kind, and its description in words."""

    kind: Kind
    words: str


_COMPRESSIONS = {
    "bz2": "bzip2",
    "gz": "gzip",
    "lz": "lzip",
    "lz4": "lz4",
    "lzma": "lzma",
    "lzo": "lzop",
    "xz": "xz",
    "zst": "zstd",
}
_ARCHIVES = {"tbz2": "bzip2", "tgz": "gzip", "txz": "xz", "tzst": "zstd"}
_WORDS = {
    Kind.ARCHIVE: "archive",
    Kind.CONFIG: "settings or data",
    Kind.DEVICE_TREE: "device tree",
    Kind.DISK: "disk image",
    Kind.KERNEL: "kernel",
    Kind.OTHER: "file",
    Kind.PACKAGE: "package",
    Kind.PATCH: "source or patch",
    Kind.PICTURE: "picture",
    Kind.TEXT: "text",
}
_EXTENSIONS = {
    extension: kind
    for kind, extensions in {
        Kind.ARCHIVE: "7z tar zip",
        Kind.CONFIG: "cfg conf config csv ini json jsonl ndjson toml xml yaml yml",
        Kind.DEVICE_TREE: "dtb dtbo",
        Kind.DISK: "cpio ext2 ext3 ext4 img iso qcow2 squashfs ubi ubifs wic",
        Kind.PACKAGE: "apk deb ipk rpm",
        Kind.PATCH: "c diff dts dtsi dtso h mbox mk patch py rs s sh",
        Kind.PICTURE: "avif bmp gif ico jpeg jpg png svg webp",
        Kind.TEXT: "asc err htm html log map md out pdf rst sha256 sha512 txt",
    }.items()
    for extension in extensions.split()
}
_NAMES = (
    (re.compile(r"(?:bz|u|xip|z)?image|vmlinu[xz](?:[-.].*)?"), Kind.KERNEL),
    (re.compile(r"(?:initrd|initramfs|ramdisk|rootfs)(?:[-.].*)?"), Kind.DISK),
    (re.compile(r"(?:.*_)?(?:def)?config"), Kind.CONFIG),
)


def mark(name: str) -> Mark:
    """The mark of a file, by its name.

    :param name: the last segment of its key.

    >>> mark("bzImage").words, mark("build.log.gz").words, mark("core.7").words
    ('kernel', 'text, gzip', 'file')
    """
    stem, _, extension = name.lower().rpartition(".")
    if stem and extension in _ARCHIVES:
        return Mark(Kind.ARCHIVE, f"archive, {_ARCHIVES[extension]}")
    if stem and extension in _COMPRESSIONS:
        kind = _kind(stem)
        kind = Kind.ARCHIVE if kind is Kind.OTHER else kind
        return Mark(kind, f"{_WORDS[kind]}, {_COMPRESSIONS[extension]}")
    kind = _kind(name.lower())
    return Mark(kind, _WORDS[kind])


def _kind(name: str) -> Kind:
    """The kind of a file.

    :param name: its name in lower case, without the suffix of a compression.
    """
    _, dot, extension = name.rpartition(".")
    if dot and extension in _EXTENSIONS:
        return _EXTENSIONS[extension]
    return next((kind for pattern, kind in _NAMES if pattern.fullmatch(name)), Kind.OTHER)
