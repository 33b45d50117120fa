"""A training step compiled for TPUs on a machine without one, and the figures that the compiled program gives."""
