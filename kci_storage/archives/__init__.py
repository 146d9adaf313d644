# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives: unpacked while they are received, checked as a whole, then stored, many files at a time."""
