from wn_jax.curvature._estimates import Estimate as Estimate  # noqa: D100 (for pickles of 0.1)
