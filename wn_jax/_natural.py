from wn_jax.curvature._natural import NaturalGradient as NaturalGradient  # pickles of version 0.1 name this module
