"""Local handlers: a function that a user wrote, in any of its shapes, made into a backend."""
