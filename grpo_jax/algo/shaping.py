"""Rewards before they become advantages, and masks before they become a loss (MATH.md sections 1, 4 and 6)."""

from __future__ import annotations

import chex
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import as_float, fixed, keep
from grpo_jax.algo.refusals import refuse


def combine_rewards(rewards: Array, weights: Array | None = None, valid: Array | None = None) -> tuple[Array, Array]:
    """Return the weighted sum of what the reward functions answered, and which samples have any answer.

    Args:
      rewards: [F, Q, G] float; NaN is no answer.
      weights: [F] float, not renormalised over those that answered; None: 1 each.
      valid: [Q, G] or [F, Q, G] bool, what there is besides; None: all.

    Returns:
      (reward, scored): [Q, G] float32 (float64 for float64), 0 where not scored; [Q, G] bool.
    """
    chex.assert_rank(rewards, 3)
    rewards = as_float(rewards)
    answered = ~jnp.isnan(rewards) if valid is None else valid & ~jnp.isnan(rewards)
    chex.assert_equal_shape([rewards, answered])
    weights = jnp.ones(rewards.shape[0], rewards.dtype) if weights is None else as_float(weights).astype(rewards.dtype)
    chex.assert_shape(weights, rewards.shape[:1])
    return jnp.sum(keep(answered, rewards * weights[:, None, None]), axis=0), jnp.any(answered, axis=0)


def clip_symmetric(x: Array, limit: float | None) -> Array:
    """Return rewards or advantages clipped to plus and minus `limit`; None: as they are."""
    x = as_float(x)
    return x if limit is None else jnp.clip(x, -limit, limit)


def soft_overlong(
    lengths: Array, max_completion_len: int, buffer_len: float | None = None, factor: float = 1.0
) -> Array:
    """Return DAPO's penalty for long completions, to be added to the reward. 2503.14476, equation 13.

    Args:
      lengths: any shape, completion tokens with the stop token.
      max_completion_len: L_max, tokens.
      buffer_len: L_buf, tokens over which the penalty grows from 0 to -1; None: L_max / 5.
      factor: multiplies the penalty.

    Returns:
      As lengths, float32: 0 up to L_max - L_buf, then linear, -factor from L_max on.

    Raises:
      ValueError: unless 0 < buffer_len <= max_completion_len.
    """
    buffer = max_completion_len / 5 if buffer_len is None else buffer_len
    if not 0 < buffer <= max_completion_len:
        raise refuse(
            f"buffer_len={buffer_len!r} with max_completion_len={max_completion_len!r}",
            "the penalty grows over the last buffer_len tokens before the limit",
            "Choose 0 < buffer_len <= max_completion_len",
        )
    return factor * jnp.clip((max_completion_len - buffer - as_float(lengths)) / buffer, -1, 0)


def overlong_filter(mask: Array, finished_by_length: Array) -> Array:
    """Return the mask without completions that the length limit cut off. 2503.14476.

    Their rewards stay in their groups' statistics and they stay in `denominators.sequences`.

    Args:
      mask: [N, T] bool.
      finished_by_length: [N] bool, or [N, T] for packed rows.
    """
    chex.assert_rank(mask, 2)
    cut = finished_by_length[:, None] if finished_by_length.ndim == 1 else finished_by_length
    return mask & ~jnp.broadcast_to(cut, mask.shape)


def kl_in_reward(rewards: Array, logp: Array, ref_logp: Array, mask: Array, kl_coef: Array | float) -> Array:
    """Return r - kl_coef times the sum of k1 = logp - ref_logp over the completion, without gradient.

    Args:
      rewards: [N], or [Q, G] of as many samples.
      logp: [N, T] of the policy that sampled: old_logp, or sampler_logp where there is no old pass.
      ref_logp: [N, T].
      mask: [N, T] bool, completion tokens.
      kl_coef: coefficient, per nat.

    Returns:
      As rewards, float32 (float64 for float64).
    """
    chex.assert_rank(logp, 2)
    chex.assert_equal_shape([logp, ref_logp, mask])
    k1 = keep(mask, fixed(as_float(logp))) - keep(mask, fixed(as_float(ref_logp)))
    return as_float(rewards) - kl_coef * jnp.sum(k1, axis=-1).reshape(rewards.shape)
