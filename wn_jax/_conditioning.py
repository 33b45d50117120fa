from wn_jax.curvature._conditioning import (
    ConditionNumbers as ConditionNumbers,  # pickles of version 0.1 name this module
)
