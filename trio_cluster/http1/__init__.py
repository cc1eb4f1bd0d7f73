"""The HTTP/1.1 server, alone: it knows byte streams and ASGI, and nothing of what is served."""
