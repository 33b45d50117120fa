from wn_jax.nnx._mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm  # for pickles of version 0.1
