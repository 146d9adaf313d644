# SPDX-License-Identifier: LGPL-2.1-or-later
"""The settings that this server gives gunicorn, and a worker's number of connections."""

from __future__ import annotations

from typing import Any

from kci_storage.config.settings import Config, ServerConfig
from kci_storage.monitoring import metrics_folder

DEFAULT_CONNECTIONS = 10_000  # per worker, if the configuration does not say
MIN_CONNECTIONS = 8  # per worker

# Descriptors.
PER_CONNECTION = 2  # the socket, and the file that a slow client is sent
PER_THREAD = 3  # a connection to the backend, a part, a lock
PER_FILL = 3  # likewise
OTHERS = 100  # listeners, counters, idle connections to the backend, the program's own files
ARCHIVES = 1024  # files of archives that are being unpacked, if there are enough descriptors:
ARCHIVES_SHARE = 4  # at most one descriptor in so many is for archives


def values(config: Config) -> dict[str, Any]:
    """The settings of gunicorn that differ from its defaults, by name."""
    server = config.server
    memory = metrics_folder.shared_memory()
    return {
        "bind": server.bind,
        "workers": server.worker_count,
        "threads": server.threads,
        "worker_class": "kci_storage.server.worker.Worker",
        "logger_class": "kci_storage.server.gunicorn_parts.Logger",
        "worker_tmp_dir": None if memory is None else str(memory),
        "keepalive": 75,  # seconds
        "timeout": 120,  # seconds without a heartbeat after which a worker is killed; its main loop never blocks
        "graceful_timeout": 300,  # seconds for running transfers at a stop; then they are cut, and clients resume
        "control_socket_disable": True,  # all servers of one user would share it
        "proc_name": "kci-storage",
    }


def wanted_connections(server: ServerConfig) -> int:
    """How many connections a worker should have, if the limit of open files allows it."""
    return server.connections or DEFAULT_CONNECTIONS


def possible_connections(config: Config, descriptors: int) -> int:
    """How many connections a worker can have, after the descriptors that it may need for other purposes.

    :param descriptors: the limit of open files.
    """
    server = config.server
    fills = -(-config.cache.max_fills // server.worker_count)
    others = OTHERS + PER_THREAD * server.threads + PER_FILL * fills
    left = descriptors - max(others, min(ARCHIVES, descriptors // ARCHIVES_SHARE))
    return max(MIN_CONNECTIONS, left // PER_CONNECTION)
