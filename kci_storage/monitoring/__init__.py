# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Prometheus and the log say."""
