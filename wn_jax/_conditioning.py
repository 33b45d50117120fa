from wn_jax.curvature._conditioning import ConditionNumbers as ConditionNumbers  # noqa: D100 (for pickles of 0.1)
