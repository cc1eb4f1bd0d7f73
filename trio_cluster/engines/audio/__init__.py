"""Audio for the speech engines: WAV files, and the features that a speech model takes as input."""
