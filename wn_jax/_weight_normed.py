from wn_jax.nnx._weight_normed import WeightNormed as WeightNormed  # pickles of version 0.1 name this module
