# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m kci_storage.cli``: runs the command if its script is not on the path."""

import sys

from kci_storage.cli.main import main

sys.exit(main())
