"""Sockets and streams: listening, connecting, accepting, reading, and the watchdog that speaks for a blocked loop."""
