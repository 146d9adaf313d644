# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory pages: the content of one folder, as HTML and as JSON."""
