"""What handlers give and what clients get: output chunks, and the encoders of every answer."""
