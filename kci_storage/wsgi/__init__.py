# SPDX-License-Identifier: LGPL-2.1-or-later
"""The WSGI middleware in front of Flask: exchange, access control, downloads, responses."""
