# SPDX-License-Identifier: LGPL-2.1-or-later
"""Durable writing of files, their properties, locks between processes: the only place that writes."""
