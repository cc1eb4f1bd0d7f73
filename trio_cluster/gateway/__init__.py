"""The gateway: what a request for a model meets, in the order in which it meets it."""
