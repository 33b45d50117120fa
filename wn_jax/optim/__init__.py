"""optax pieces for trees with nodes: decay masks, norm-keeping updates, statistics to log, moments across a rewrite.

A learning rate of its own for `g` and `v` needs nothing from here, as `wn_jax.labels` is what `optax.partition`
asks for:

>>> import optax, wn_jax as wn
>>> tx = optax.partition({"g": optax.sgd(0.01), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}, wn.labels)

Muon orthogonalizes the updates of matrices and would take `g`, of shape (1, features), for one. Keep it to `v`:

>>> adam = optax.adam(1e-3)
>>> tx = optax.partition({"v": optax.contrib.muon(0.02), "g": adam, "other": adam}, wn.labels)
"""

from wn_jax.optim._directions import ProjectDirectionsState, direction_stats, project_directions
from wn_jax.optim._masks import weight_decay_mask
from wn_jax.optim._moments import transfer_state

__all__ = [
    "ProjectDirectionsState",
    "direction_stats",
    "project_directions",
    "transfer_state",
    "weight_decay_mask",
]


def __dir__() -> list[str]:
    return __all__
