"""gunicorn's own messages, as lines of the server's log."""

from __future__ import annotations

import logging
from typing import Any

from gunicorn.glogging import Logger as GunicornLogger

from kci_storage.monitoring import logs


class Logger(GunicornLogger):
    """gunicorn's, whose lines are logfmt; also in a file, if the setting ``errorlog`` names one."""

    def setup(self, cfg: Any) -> None:
        """Take over gunicorn's settings, at the start and at a reload."""
        super().setup(cfg)
        for handler in tuple(self.error_log.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.setFormatter(logs.LogfmtFormatter())
            elif type(handler) is logging.StreamHandler:
                self.error_log.removeHandler(handler)
        if cfg.errorlog == "-" and not any(isinstance(one, logs.LineHandler) for one in self.error_log.handlers):
            self.error_log.addHandler(logs.line_handler())
