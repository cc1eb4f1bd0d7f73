"""The link: one websocket between a worker and its master, made safe, with a protocol session spoken over it."""
