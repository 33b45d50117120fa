"""Parameter trees in `.safetensors` files: `save` and `load`.

Read `trees` first (which leaves go into a file, and come out of it), then `nodes` (the parts of one leaf), `facts` (the
metadata that say what the arrays are), `file_format` (the arrays), `files` (how any
file is put in place safely), and `kinds` (what a file is that is none of ours).
"""

from wn_jax._saving.trees import load, save

__all__ = ["load", "save"]
