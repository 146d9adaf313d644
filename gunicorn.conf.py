"""gunicorn's settings for ``gunicorn wsgi:app``: all of them come from kci_storage.server.settings."""

from kci_storage.server.settings import *  # noqa: F403
