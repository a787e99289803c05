"""Sums over sequences: a sequence is a row, or one segment of a packed row (DESIGN.md, contract 6).

Segment ids are [N, T] ints, 0 for padding; within a row an id stands for one sequence, and the same id in another row
for another one. Ids need be neither dense nor contiguous, and a row may hold up to T of them.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import keep


class Sequences(NamedTuple):
    """Which sequence each token of a step belongs to.

    Attributes:
      mask: [N, T] bool, trained tokens.
      label: [N, T] int32 in [0, T), equal within a sequence; None: the row is the sequence.
    """

    mask: Array
    label: Array | None = None

    def total(self, x: Array) -> Array:
        """Return, at each token, the sum of x [N, T] over its sequence's trained tokens: [N, T], or [N, 1] by row."""
        x = keep(self.mask, x)
        if self.label is None:
            return jnp.sum(x, axis=-1, keepdims=True)
        columns = x.shape[-1]
        sums = jax.vmap(lambda row, label: jax.ops.segment_sum(row, label, num_segments=columns))(x, self.label)
        return jnp.take_along_axis(sums, self.label, axis=-1)

    def length(self, dtype: jnp.dtype) -> Array:
        """Return the trained tokens of each token's sequence, at least 1: [N, T], or [N, 1] by row."""
        return jnp.maximum(self.total(self.mask.astype(dtype)), 1)

    def mean(self, x: Array) -> Array:
        """Return, at each token, the mean of x [N, T] over the trained tokens of its sequence, 0 if it has none."""
        return self.total(x) / self.length(x.dtype)

    def any(self, x: Array) -> Array:
        """Return, at each token, whether x [N, T] holds for any trained token of its sequence."""
        return self.total(x.astype(jnp.float32)) > 0


def sequences(mask: Array, segments: Array | None) -> Sequences:
    """Return the `Sequences` of a mask [N, T] and segment ids [N, T] or None."""
    if segments is None:
        return Sequences(mask)
    chex.assert_equal_shape([mask, segments])
    # A row's id is known by where it first stands among the row's sorted ids: unique, and below T whatever the ids are.
    label = jax.vmap(lambda row: jnp.searchsorted(jnp.sort(row), row, method="scan_unrolled"))(segments)
    return Sequences(mask & (segments != 0), label.astype(jnp.int32))


def count_sequences(segments: Array) -> Array:
    """Return how many sequences ids [N, T] name, int32: the distinct ids of each row but 0."""
    ids = jnp.sort(segments, axis=-1)
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=-1)
    return jnp.sum(first & (ids != 0), dtype=jnp.int32)
