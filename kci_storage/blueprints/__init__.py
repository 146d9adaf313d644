# SPDX-License-Identifier: LGPL-2.1-or-later
"""Views: gather what a request says, call a service, answer."""
