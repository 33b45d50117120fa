"""Training the arms of an experiment, side by side."""
