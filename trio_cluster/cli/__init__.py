"""The command line: the ``trio-cluster`` command, its arguments and options, and its log."""

from .commands import main

__all__ = ["main"]
