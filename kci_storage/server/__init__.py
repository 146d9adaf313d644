"""gunicorn and its processes: settings, hooks, the worker, reload."""
