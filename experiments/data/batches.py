"""The order in which training sees the examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def batch_indices(key: jax.Array, examples: int, batch_size: int, first_step: jax.Array, steps: int) -> jax.Array:
    """The examples of `steps` batches from `first_step` on, shape (steps, batch_size).

    Each epoch is a permutation of its own, less the last `examples % batch_size`. This is a pure function of key and
    step, so that a resumed run sees the batches that it would have seen.
    """

    def order(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), examples)

    per_epoch = examples // batch_size
    step = first_step + jnp.arange(steps)
    first_epoch = first_step // per_epoch
    # One more than the steps fill, as the first of these may be in the middle of an epoch.
    epochs = first_epoch + jnp.arange(-(-steps // per_epoch) + 1)
    orders = jax.vmap(order)(epochs)
    batches = orders[:, : per_epoch * batch_size].reshape(len(epochs), per_epoch, batch_size)
    return batches[step // per_epoch - first_epoch, step % per_epoch]
