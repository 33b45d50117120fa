from wn_jax.curvature._lanczos import Eigenvalues as Eigenvalues  # pickles of version 0.1 name this module
from wn_jax.curvature._lanczos import SpectralDensity as SpectralDensity
