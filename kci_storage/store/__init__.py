# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects: reading, storing and deleting them, whichever driver has them."""
