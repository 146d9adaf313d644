# SPDX-License-Identifier: LGPL-2.1-or-later
"""kci-storage: the file storage server of KernelCI."""

__version__ = "0.1.0"
