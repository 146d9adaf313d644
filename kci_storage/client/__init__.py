# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client: the commands ``upload``, ``download``, ``ls``, ``rm`` and ``stat``. It knows nothing of the server."""
