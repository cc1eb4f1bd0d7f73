"""The core that everything flows through: requests, answers, calls, models, and what is counted and observed.

No sockets and no protocol here, and of trio only its primitives for waiting. Read ``call.py`` first.
"""
