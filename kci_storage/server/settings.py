# SPDX-License-Identifier: LGPL-2.1-or-later
"""gunicorn's settings, as the configuration and facts about gunicorn demand; a worker's number of connections."""

from __future__ import annotations

from typing import Any

from kci_storage.config.settings import Config, ServerConfig
from kci_storage.monitoring import metrics_folder

MOST_CONNECTIONS = 10_000  # of a worker, where the configuration leaves it open

# Descriptors.
PER_CONNECTION = 2  # its socket, and the file that a slow client is sent
PER_THREAD = 3  # of a request at work: a connection to the backend, a part, a lock
PER_FILL = 3  # likewise
OTHERS = 100  # listeners, counters, idle connections to the backend, the program's own files
ARCHIVES = 1024  # files of archives that are being unpacked; but where there are few descriptors
ARCHIVES_SHARE = 4  # no more than one in so many is for those
LEAST_CONNECTIONS = 8


def values(config: Config) -> dict[str, Any]:
    """Those of gunicorn's settings that are not as gunicorn has them, by name."""
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
        "timeout": 120,  # seconds without a heartbeat after which a worker is killed; its main loop never works
        "graceful_timeout": 300,  # seconds for running transfers at a stop; the rest is cut, and clients resume
        "control_socket_disable": True,  # it would be shared by all servers of one user
        "proc_name": "kci-storage",
    }


def wanted_connections(server: ServerConfig) -> int:
    """How many connections a worker is to have, if the system lets it."""
    return server.connections or MOST_CONNECTIONS


def possible_connections(config: Config, descriptors: int) -> int:
    """How many connections a worker can have with so many descriptors, and as many as it may need beside."""
    server = config.server
    fills = -(-config.cache.max_fills // server.worker_count)
    others = OTHERS + PER_THREAD * server.threads + PER_FILL * fills
    left = descriptors - max(others, min(ARCHIVES, descriptors // ARCHIVES_SHARE))
    return max(LEAST_CONNECTIONS, left // PER_CONNECTION)
