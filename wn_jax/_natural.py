from wn_jax.curvature._natural import NaturalGradient as NaturalGradient  # for pickles of version 0.1
