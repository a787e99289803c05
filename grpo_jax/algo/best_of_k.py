"""The analytic advantage of pass@k training, for any rewards (2508.10751; MATH.md section 1, pass_at_k)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import fixed, keep, root


def binomial_ratio(a: Array, b: Array, j: int) -> Array:
    """Return C(a, j) / C(b, j) as a product of j quotients, 0 where a < j; float arrays that broadcast, b >= j."""
    one = jnp.ones(jnp.broadcast_shapes(a.shape, b.shape), jnp.result_type(a, b))
    return jax.lax.fori_loop(0, j, lambda i, p: p * jnp.maximum(a - i, 0) / jnp.maximum(b - i, 1), one)


def advantages(rewards: Array, valid: Array, k: int, eps: float | Array) -> Array:
    """Return (mean best-of-k over the subsets that hold a sample - over all subsets) / (their std + eps).

    Args:
      rewards: [Q, G] float, of magnitude at most about 1.
      valid: [Q, G] bool.
      k: 1 <= k <= G.
      eps: added to the standard deviation, scalar or [Q, 1].

    Returns:
      [Q, G]; 0 for a group of fewer than k samples and where every subset has the same best.
    """
    rank = jnp.arange(1, rewards.shape[-1] + 1, dtype=rewards.dtype)  # [G]: i of the formulas
    count = jnp.sum(valid, axis=-1, keepdims=True).astype(rewards.dtype)  # [Q, 1]: N
    order = jnp.argsort(jnp.where(valid, rewards, jnp.inf), axis=-1)
    ranked = rank <= count
    ascending = jnp.take_along_axis(rewards, order, axis=-1)
    best = jnp.max(jnp.where(ranked, ascending, -jnp.inf), axis=-1, keepdims=True)
    # The weights below sum to 1, so an offset drops out; the group's best as zero keeps the differences exact.
    ascending = keep(ranked, ascending - best)
    # Of the subsets that hold i: the share whose best it is, C(i-1, k-1) / C(N-1, k-1), and the share whose best is a
    # given j above it, C(j-2, k-2) / C(N-1, k-1).
    holds = binomial_ratio(rank - 1, count - 1, k - 1)
    above = binomial_ratio(rank - 2, count - 2, k - 2) * (k - 1) / jnp.maximum(count - 1, 1)
    weight = keep(ranked, holds * k / jnp.maximum(count, 1))  # C(j-1, k-1) / C(N, k)
    mean = jnp.sum(weight * ascending, axis=-1, keepdims=True)
    deviation = keep(ranked, ascending - mean)
    scale = fixed(jnp.max(jnp.abs(deviation), axis=-1, keepdims=True))
    scale = jnp.where(scale == 0, 1, scale)
    std = scale * root(jnp.sum(weight * jnp.square(deviation / scale), axis=-1, keepdims=True))
    better = keep(ranked, above * ascending)
    better = jnp.flip(jnp.cumsum(jnp.flip(better, -1), axis=-1), -1) - better  # sum over j > i
    score = (holds * ascending + better - mean) / (std + eps)
    differs = ascending[:, k - 1 : k] < 0  # nor in a group of fewer than k, which has 0 at this rank
    inverse = jnp.argsort(order, axis=-1)
    return keep(valid & differs, jnp.take_along_axis(score, inverse, axis=-1))
