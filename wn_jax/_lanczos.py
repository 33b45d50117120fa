from wn_jax.curvature._lanczos import Eigenvalues as Eigenvalues  # for pickles of version 0.1
from wn_jax.curvature._lanczos import SpectralDensity as SpectralDensity
