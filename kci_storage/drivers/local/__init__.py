# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for a folder of this machine."""
