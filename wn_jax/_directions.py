from wn_jax.optim._directions import (
    ProjectDirectionsState as ProjectDirectionsState,  # pickles of version 0.1 name this module
)
