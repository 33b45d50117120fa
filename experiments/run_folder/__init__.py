"""The folder of a run: what is written there, and going on from it."""
