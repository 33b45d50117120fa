from wn_jax.torch._layouts import Array as Array  # noqa: D100 (for pickles of 0.1)
