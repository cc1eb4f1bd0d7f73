"""Limits of keys: requests and tokens a minute, requests at the same time, and budgets of calendar periods.

``window.py`` and ``account.py`` are the rules, without IO; ``memory.py`` and ``redis.py`` are the two places where
requests are counted; ``reservation.py`` ties what a request has reserved to the real end of its calls.
"""
