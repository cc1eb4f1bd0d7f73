"""What engines for speech share: WAV files, and the features that a speech model listens to."""
