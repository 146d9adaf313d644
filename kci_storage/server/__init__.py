# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server under gunicorn: settings, hooks, the worker, reload."""
