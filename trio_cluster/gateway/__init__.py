"""The gateway: what happens to a request between the HTTP server and the router. Read ``pipeline.py`` first."""
