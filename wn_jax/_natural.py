from wn_jax.curvature._natural import NaturalGradient as NaturalGradient  # noqa: D100 (for pickles of 0.1)
