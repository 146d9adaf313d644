# SPDX-License-Identifier: LGPL-2.1-or-later
"""The copies of backend objects on local disk: where they lie, how fresh they are, and what makes room."""
