"""Routing: which models there are, which replica a request goes to, how well each replica does, and the retry.

``router.py`` opens calls; ``catalog.py`` knows names and replicas, ``policy.py`` chooses among them, and ``health.py``
says which of them may be chosen.
"""
