# SPDX-License-Identifier: LGPL-2.1-or-later
"""gunicorn's settings for ``gunicorn wsgi:app``: all of them come from kci_storage.server.hooks."""

from kci_storage.server.hooks import *  # noqa: F403
