from wn_jax.curvature._estimates import Estimate as Estimate  # pickles of version 0.1 name this module
