from wn_jax.curvature._lanczos import Eigenvalues as Eigenvalues  # noqa: D100 (for pickles of 0.1)
from wn_jax.curvature._lanczos import SpectralDensity as SpectralDensity
