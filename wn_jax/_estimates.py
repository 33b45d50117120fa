from wn_jax.curvature._estimates import Estimate as Estimate  # for pickles of version 0.1
