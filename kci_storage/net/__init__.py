# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to clients: which of them cost the worker a thread, and which only wait."""
