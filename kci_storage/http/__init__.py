# SPDX-License-Identifier: LGPL-2.1-or-later
"""HTTP as its RFCs have it, in pure functions: conditions, ranges, multipart bodies, media types, problems."""
