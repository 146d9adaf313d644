"""gunicorn's settings for ``gunicorn wsgi:app``: all of them come from kci_storage.serving."""

from kci_storage.serving import *  # noqa: F403
