# SPDX-License-Identifier: LGPL-2.1-or-later
"""What gunicorn serves: ``gunicorn wsgi:app``."""

from kci_storage.app import create_app

app = create_app()
