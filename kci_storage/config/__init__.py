# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: its settings, and how a file is read."""
