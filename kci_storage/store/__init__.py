# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading, storing and deleting objects, independent of the storage driver."""
