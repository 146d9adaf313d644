# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access control: tokens and permissions, crawlers, networks, limits, and the browser challenge."""
