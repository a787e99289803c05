"""How columns get into a block of keys or values: each row's own, one for all rows, or several behind the others."""

import jax
import jax.numpy as jnp

KEYS, VALUES = 3, 2
"""The axis of a block's columns: keys are [R, K, d, c], values [R, K, c, d]."""


def put(block: jax.Array, new: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """``new`` [R, K, d] at ``column`` [R] of a block; columns from c on are dropped."""

    def one(row: jax.Array, value: jax.Array, at: jax.Array) -> jax.Array:
        place = row.at[:, at] if axis == VALUES else row.at[:, :, at]
        return place.set(value, mode="drop")

    return jax.vmap(one)(block, new, column)


def put_together(block: jax.Array, new: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """`put` for all rows at one column: a slice of a segment's short buffer, and no scatter."""
    at = jnp.minimum(column, block.shape[axis] - 1)
    old = jax.lax.dynamic_slice_in_dim(block, at, 1, axis)
    kept = jnp.where(at == column, jnp.expand_dims(new, axis), old)
    return jax.lax.dynamic_update_slice_in_dim(block, kept, at, axis)


def put_behind(block: jax.Array, new: jax.Array, start: jax.Array, steps: jax.Array, axis: int) -> jax.Array:
    """The block with the first ``steps`` columns of ``new`` from column ``start`` [R] on; none from C on.

    A product with zeros and ones, exact for finite numbers: each row's shift as a gather is a loop over rows on a TPU.
    """
    column, step = jnp.arange(block.shape[axis]), jnp.arange(new.shape[axis])[:, None]
    goes = (column == start[:, None, None] + step) & (step < steps)  # [R, W, C]
    pattern = "rkdw,rwc->rkdc" if axis == KEYS else "rkwd,rwc->rkcd"
    moved = jnp.einsum(pattern, new.astype(jnp.float32), goes.astype(jnp.float32), precision="highest")
    there = jnp.expand_dims(goes.any(axis=1), [i for i in (1, 2, 3) if i != axis])
    return jnp.where(there, moved.astype(block.dtype), block)
