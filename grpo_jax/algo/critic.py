"""Generalised advantage estimation and the value loss, for the rung with a critic (MATH.md section 1, gae)."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.aggregate import masked_sum
from grpo_jax.algo.arrays import as_float, bound, keep
from grpo_jax.algo.refusals import refuse
from grpo_jax.algo.statistics import Denominators


def gae(
    rewards: Array,
    values: Array,
    completion: Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    penalty: Array | None = None,
    scored: Array | None = None,
    segments: Array | None = None,
) -> tuple[Array, Array]:
    """Return the advantages and returns of each completion token. 1506.02438.

    Index t is about token t: `values[n, t]` is the value before it, V(tokens[n, :t]). The value after the last
    completion token is 0. Columns outside the completion are skipped, and the recursion goes on across them.

    Args:
      rewards: [N] float, of the whole completion, given at its last token; NaN: not scored. With segments [N, T], the
        completion's reward at each of its tokens.
      values: [N, T] float.
      completion: [N, T] bool, the completion's tokens before any filter.
      gamma: discount per token.
      lam: lambda.
      penalty: [N, T] taken from the reward of each token, coefficient times k1; None: none.
      scored: bool, as rewards; None: all that are not NaN.
      segments: [N, T] int, 0 for padding, ids contiguous in a row; None: a row is a sequence.

    Returns:
      (advantages, returns), each [N, T] float32 (float64 for float64 values), 0 outside the completion and in rows
      that were not scored. returns = advantages + values, before any whitening.

    Raises:
      ValueError: rewards [N] with segments.
    """
    chex.assert_rank(values, 2)
    chex.assert_equal_shape([values, completion])
    if segments is not None and rewards.ndim == 1:
        raise refuse("rewards [N] with segments", "a row holds several completions", "Give rewards [N, T]")
    shape = values.shape
    rewards = jnp.broadcast_to(as_float(rewards if rewards.ndim == 2 else rewards[:, None]), shape)
    answered = ~jnp.isnan(rewards)
    if scored is not None:
        answered &= jnp.broadcast_to(scored if scored.ndim == 2 else scored[:, None], shape)
    at = completion & answered if segments is None else completion & answered & (segments != 0)
    values = keep(at, as_float(values))
    cost = jnp.zeros(shape, values.dtype) if penalty is None else keep(at, as_float(penalty))
    ids = jnp.ones(shape, jnp.int32) if segments is None else segments
    gains = keep(at, rewards).astype(values.dtype)

    def back(carry: tuple[Array, Array, Array], column: tuple[Array, ...]) -> tuple[Any, Array]:
        """One column, from the right; the carry is (A, V, id) of the next completion token, id -1 for none."""
        after_advantage, after_value, after_id = carry
        here, value, gain, charge, of = column
        last = of != after_id
        after_advantage, after_value = keep(~last, after_advantage), keep(~last, after_value)
        delta = keep(last, gain) - charge + gamma * after_value - value
        advantage = delta + gamma * lam * after_advantage
        moved = (advantage, value, of)
        return tuple(jnp.where(here, new, old) for new, old in zip(moved, carry, strict=True)), keep(here, advantage)

    rows = shape[0]
    start = (jnp.zeros(rows, values.dtype), jnp.zeros(rows, values.dtype), jnp.full(rows, -1, ids.dtype))
    columns = tuple(x.T for x in (at, values, gains, cost, ids))
    advantages = jax.lax.scan(back, start, columns, reverse=True)[1].T
    return advantages, keep(at, advantages + values)


def value_loss(
    values: Array,
    old_values: Array | None,
    returns: Array,
    mask: Array,
    *,
    clip: float | None = 0.2,
    denominators: Denominators | None = None,
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Return half the squared error of the values, clipped around the old ones, as a mean over tokens. 1707.06347.

    Args:
      values: [N, T] float, what is differentiated.
      old_values: [N, T], from before the first update of the rollout; None only with clip None.
      returns: [N, T], from `gae`.
      mask: [N, T] bool, trained tokens of scored rows.
      clip: half-width of the band around old_values, in units of value; the larger error of the two counts. None: off.
      denominators: of the whole optimizer step, counted with this mask; None: these arguments are the whole step.

    Returns:
      (loss, metrics): a scalar, float32 (float64 for float64 inputs); "value_loss" and "value_clip_ratio" as
      (sum, count).

    Raises:
      ValueError: a clip without old_values.
    """
    chex.assert_rank(values, 2)
    chex.assert_equal_shape([values, returns, mask])
    if clip is not None and old_values is None:
        raise refuse(f"clip={clip!r} without old_values", "the band is around them", "Give old_values or clip=None")
    values = keep(mask, as_float(values))
    returns = keep(mask, jax.lax.stop_gradient(as_float(returns)))
    error = jnp.square(values - returns)
    clipped = jnp.zeros(mask.shape, bool)
    if clip is not None and old_values is not None:
        old_values = keep(mask, jax.lax.stop_gradient(as_float(old_values)))
        held = jnp.square(bound(values, old_values - clip, old_values + clip) - returns)
        clipped = held > error
        error = jnp.where(clipped, held, error)
    trained = jnp.sum(mask).astype(error.dtype)
    tokens = jnp.maximum(trained if denominators is None else denominators.tokens, 1).astype(error.dtype)
    loss = masked_sum(error / 2, mask) / tokens
    metrics = {
        "value_loss": (jax.lax.stop_gradient(loss), trained / tokens),
        "value_clip_ratio": (jnp.sum(mask & clipped).astype(error.dtype), trained),
    }
    return loss, metrics
