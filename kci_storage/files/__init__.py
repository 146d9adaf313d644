# SPDX-License-Identifier: LGPL-2.1-or-later
"""Durable files, locks and counters shared by processes, jobs: the only package that writes files."""
