"""The two sides of the cluster: ``master.py`` admits workers and forwards calls, ``worker.py`` dials and serves."""
