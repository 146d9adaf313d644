# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fills: a cold object is fetched into the cache once, and all requests for it are answered meanwhile."""
