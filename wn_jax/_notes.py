from wn_jax._program.notes import Reason as Reason  # noqa: D100 (for pickles of 0.1)
