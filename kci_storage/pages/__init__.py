# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory pages: one level of the store, for people and, as JSON, for programs."""
