from wn_jax.torch._layouts import Array as Array  # for pickles of version 0.1
