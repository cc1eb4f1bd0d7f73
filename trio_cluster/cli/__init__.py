"""The command line: the ``trio-cluster`` command, its arguments and options, and its log."""

from .commands import main, run_application

__all__ = ["main", "run_application"]
