from wn_jax.nnx._mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm  # noqa: D100 (for pickles of 0.1)
