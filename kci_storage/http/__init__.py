# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTTP by its RFCs, as pure functions: conditions, ranges, multipart bodies, media types, error responses."""
