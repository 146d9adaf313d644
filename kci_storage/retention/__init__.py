# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retention: how long objects are kept, and the deletion of expired ones."""
