from wn_jax.torch._layouts import Array as Array  # pickles of version 0.1 name this module
