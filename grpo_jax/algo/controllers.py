"""Coefficients and references that move from step to step, as pure transitions; their states go into the checkpoint."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import as_float


def adaptive_kl(
    coef: Array | float, kl: Array | float, *, target: float, horizon: float, completions: Array | int
) -> Array:
    """Return the KL coefficient of the next step. 1909.08593, section 2.2.

    Args:
      coef: this step's coefficient.
      kl: this step's KL, nat: the mean over sequences of the sum of k1 over their trained tokens, which `policy_loss`
        reports as kl_per_sequence.
      target: KL to hold, nat per sequence.
      horizon: completions over which the coefficient may change by a factor of about e at full error.
      completions: completions of this step.

    Returns:
      coef (1 + clip(kl / target - 1, -0.2, 0.2) completions / horizon), float32 (float64 for float64).
    """
    error = jnp.clip(as_float(kl) / target - 1, -0.2, 0.2)
    coef = as_float(coef)
    return coef * (1 + error * jnp.asarray(completions, coef.dtype) / horizon)


class EntropyController(NamedTuple):
    """The state of `adaptive_entropy`.

    Attributes:
      coef: scalar float, the coefficient.
      active: scalar bool, whether the coming step uses it; False at first.
    """

    coef: Array
    active: Array

    @classmethod
    def start(cls, coef: float = 0.0) -> EntropyController:
        """Return the state before the first step."""
        return cls(jnp.asarray(coef, jnp.float32), jnp.asarray(False))

    @property
    def effective(self) -> Array:
        """The coefficient to hand to `policy_loss` in the coming step."""
        return jnp.where(self.active, self.coef, 0)


def adaptive_entropy(
    state: EntropyController,
    entropy: Array | float,
    *,
    target: float = 0.2,
    delta: float = 0.005,
    low: float = 0.0,
    high: float = 1.0,
) -> EntropyController:
    """Return the entropy coefficient's state after a step. Skywork-OR1, 2505.22312.

    Args:
      state: of this step.
      entropy: this step's mean entropy, nat per token.
      target: entropy to hold, nat per token.
      delta: change of the coefficient per step.
      low: least coefficient.
      high: largest coefficient.

    Returns:
      The coefficient one delta up if the entropy is at most the target, else one down; active iff it is at most that.
    """
    below = as_float(entropy) <= target
    coef = as_float(state.coef)
    return EntropyController(jnp.clip(coef + jnp.where(below, delta, -delta).astype(coef.dtype), low, high), below)


def follow_reference(
    reference: chex.ArrayTree, policy: chex.ArrayTree, step: Array | int, *, alpha: float = 0.6, every: int = 512
) -> chex.ArrayTree:
    """Return the reference after an update: alpha policy + (1 - alpha) reference at every k-th. 2404.09656.

    Args:
      reference: pytree of float arrays.
      policy: pytree of the same structure and shapes, after the update.
      step: optimizer updates done so far, this one among them.
      alpha: weight of the policy, in [0, 1].
      every: updates between two moves.

    Returns:
      As reference, in its dtypes; mixed in float32 (float64 for float64).
    """
    chex.assert_trees_all_equal_structs(reference, policy)

    def mix(ref: Array, new: Array) -> Array:
        return (alpha * as_float(new) + (1 - alpha) * as_float(ref)).astype(ref.dtype)

    due = (jnp.asarray(step) > 0) & (jnp.asarray(step) % every == 0)
    return jax.lax.cond(due, lambda: jax.tree.map(mix, reference, policy), lambda: reference)
