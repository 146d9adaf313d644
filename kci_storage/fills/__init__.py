# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a cold object comes into the cache while everybody who asked for it reads along."""
