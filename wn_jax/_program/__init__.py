"""Programs: reading a jaxpr, following weights through it, and running it on weights that are not multiplied out."""
