from wn_jax._program.notes import Reason as Reason  # for pickles of version 0.1
