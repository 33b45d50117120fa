from wn_jax.optim._directions import ProjectDirectionsState as ProjectDirectionsState  # noqa: D100 (for pickles of 0.1)
