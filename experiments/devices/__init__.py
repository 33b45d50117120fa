"""The mesh of devices, and where arrays lie on it."""
