from wn_jax.curvature._conditioning import ConditionNumbers as ConditionNumbers  # for pickles of version 0.1
