"""Answers: output chunks, which handlers give, and the encoders, which make of them what clients get."""
