from wn_jax.optim._directions import ProjectDirectionsState as ProjectDirectionsState  # for pickles of version 0.1
