# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stub: everything is in setup.cfg."""

from setuptools import setup

setup()
