"""Audio for the speech engines: WAV files, other formats with PyAV, and the features that a speech model takes."""
