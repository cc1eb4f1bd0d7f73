"""Makes ``python -m trio_cluster`` the ``trio-cluster`` command."""

from __future__ import annotations

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
