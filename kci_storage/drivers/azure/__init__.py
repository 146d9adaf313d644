# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for Azure Blob Storage."""
