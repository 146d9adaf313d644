# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way of a request from outside in, before Flask sees it: exchange, admission, downloads, responses."""
