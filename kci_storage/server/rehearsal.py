# SPDX-License-Identifier: LGPL-2.1-or-later
"""A trial start: builds the server's services with a configuration, in a separate process.

``python -m kci_storage.server.rehearsal FILE`` builds them as a worker does, without serving, and prints one line if
that fails. The master runs it before it starts workers with a new configuration, since a worker that does not start
ends the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kci_storage.config.settings import Config, ConfigError
from kci_storage.server.preflight import usable
from kci_storage.services import build_services

REHEARSAL_SECONDS = 60.0  # a driver may contact its backend when it is made


def rehearse(config: Config) -> None:
    """Build the server's services from the configuration's file, in a separate process.

    :raises ConfigError: that fails, or takes longer than :data:`REHEARSAL_SECONDS`.
    """
    command = [sys.executable, "-m", "kci_storage.server.rehearsal", str(config.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=REHEARSAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{config.path}: the server does not start with it in {REHEARSAL_SECONDS:g} s") from None
    if done.returncode == os.EX_CONFIG:
        raise ConfigError(done.stderr.strip())
    if done.returncode != 0:
        reason = (done.stderr.strip() or "for a reason unknown").splitlines()[-1]
        raise ConfigError(f"{config.path}: the server does not start with it: {reason}")


def main() -> int:
    """Build the services; the process's exit code."""
    try:
        build_services(usable(Path(sys.argv[1])))
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
