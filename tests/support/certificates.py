# SPDX-License-Identifier: LGPL-2.1-or-later
"""Self-signed certificates for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

SECONDS = 60
_COMMAND = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"


class Certificate(NamedTuple):
    """The files of a certificate, in PEM."""

    certificate: Path
    key: Path
    both: Path  # certificate and key in one file


def self_signed(folder: Path, name: str = "test", host: str = "IP:127.0.0.1") -> Certificate:
    """Create a certificate.

    :param folder: for its files.
    :param name: of the files, without their suffix.
    :param host: the server's name: ``IP:127.0.0.1`` or ``DNS:blobs.example``.
    """
    files = Certificate(*(folder / f"{name}.{suffix}" for suffix in ("crt", "key", "pem")))
    output: list[str | Path] = ["-addext", f"subjectAltName={host}", "-keyout", files.key, "-out", files.certificate]
    subprocess.run([*_COMMAND.split(), *output], check=True, capture_output=True, timeout=SECONDS)
    files.both.touch(mode=0o600)
    files.both.write_bytes(files.certificate.read_bytes() + files.key.read_bytes())
    return files
