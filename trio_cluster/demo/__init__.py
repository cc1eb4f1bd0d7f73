"""The demo: a master, two workers and five real models on one machine."""

from .cluster import run_demo

__all__ = ["run_demo"]
