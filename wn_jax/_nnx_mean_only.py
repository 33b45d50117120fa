from wn_jax.nnx._mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm  # pickles of version 0.1 name this module
