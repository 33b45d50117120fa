from wn_jax.nnx._weight_normed import WeightNormed as WeightNormed  # for pickles of version 0.1
