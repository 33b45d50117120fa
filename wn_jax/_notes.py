from wn_jax._program.notes import Reason as Reason  # pickles of version 0.1 name this module
