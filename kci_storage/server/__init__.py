# SPDX-License-Identifier: LGPL-2.1-or-later
"""gunicorn and its processes: settings, hooks, the worker, reload."""
