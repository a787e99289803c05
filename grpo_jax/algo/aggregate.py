"""The only code that turns per-token values into a scalar (MATH.md section 5; DESIGN.md, contracts 5 and 6).

Every aggregation has the signature `f(x, step) -> (sum, count)`: the sum runs over the tokens at hand, the count is of
the whole optimizer step, so that sum / count of microbatches add up to that of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import keep
from grpo_jax.algo.segments import Sequences


class Step(NamedTuple):
    """What an aggregation divides by.

    Attributes:
      sequences: the tokens at hand, and their sequences.
      tokens: scalar, trained tokens of the optimizer step.
      sequence_count: scalar, sequences sampled for the optimizer step.
      max_completion_len: tokens, for `constant`.
    """

    sequences: Sequences
    tokens: Array
    sequence_count: Array
    max_completion_len: int | None = None


def masked_sum(x: Array, mask: Array) -> Array:
    """Return the sum of x [N, T] over the mask [N, T]."""
    return jnp.sum(keep(mask, x))


def token_mean(x: Array, step: Step) -> tuple[Array, Array]:
    """Mean over the tokens of the step. DAPO, 2503.14476."""
    return masked_sum(x, step.sequences.mask), jnp.maximum(step.tokens, 1)


def seq_mean_token_mean(x: Array, step: Step) -> tuple[Array, Array]:
    """Mean over sequences of their means over tokens. GRPO, 2402.03300."""
    return masked_sum(x / step.sequences.length(x.dtype), step.sequences.mask), jnp.maximum(step.sequence_count, 1)


def seq_mean_token_sum(x: Array, step: Step) -> tuple[Array, Array]:
    """Mean over sequences of their sums over tokens. RLOO, 2402.14740; LUSPO, 2602.05261, with sequence ratios."""
    return masked_sum(x, step.sequences.mask), jnp.maximum(step.sequence_count, 1)


def constant(x: Array, step: Step) -> tuple[Array, Array]:
    """Sum over tokens, divided by sequences times the longest completion allowed. Dr. GRPO, 2503.20783."""
    assert step.max_completion_len is not None
    return masked_sum(x, step.sequences.mask), jnp.maximum(step.sequence_count, 1) * float(step.max_completion_len)


AGGREGATIONS: dict[str, Callable[[Array, Step], tuple[Array, Array]]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "constant": constant,
}
"""Aggregations by name; the keys are those of `spec.Aggregation`."""
