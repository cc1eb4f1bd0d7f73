"""Routing: the catalogue of models and replicas, the choice of a replica, its health, and the retry.

``router.py`` opens calls; ``catalog.py`` knows the models and their replicas, ``policy.py`` chooses among the replicas,
and ``health.py`` records which of them may be chosen.
"""
