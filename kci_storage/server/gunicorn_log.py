"""gunicorn's own messages, as lines of the server's log."""

from __future__ import annotations

import logging

from kci_storage.monitoring import logs
from kci_storage.server import gunicorn_parts


class Logger(gunicorn_parts.Logger):
    """gunicorn's, whose lines are logfmt; also in a file, if the setting ``errorlog`` names one."""

    def adapt(self, log: logging.Logger, to_file: bool) -> None:
        for handler in tuple(log.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.setFormatter(logs.LogfmtFormatter())
            else:
                log.removeHandler(handler)
        if not to_file:
            log.addHandler(logs.line_handler())
