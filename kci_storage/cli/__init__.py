# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command ``kci-storage`` and its subcommands."""
