"""Requests: reading and checking what clients send. Start with ``types.py`` and ``checks.py``."""
