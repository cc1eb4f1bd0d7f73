"""Models that run when they are asked for: what is started and stopped, when, and in how much memory."""
