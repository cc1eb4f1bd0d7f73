"""The core: requests, calls and their answers, byte channels, models, statistics and observers.

There are no sockets and no protocol here, and of trio only its primitives for waiting and its threads.
Read ``call.py`` first.
"""
