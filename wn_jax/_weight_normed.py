from wn_jax.nnx._weight_normed import WeightNormed as WeightNormed  # noqa: D100 (for pickles of 0.1)
