"""Data-dependent initialization: `init_from_data`.

Read `plan` for which nodes and biases are set, `grid` for how the numbers of an output become those of a node,
`statistics` for what is taken of a batch, and `initialize` for the run that does it.
"""

from wn_jax._data_init.initialize import init_from_data

__all__ = ["init_from_data"]
