"""Ratios to the old policy, corrections for the sampler's policy, and what they reject (MATH.md section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import SLACK, above, below, bound, clamp_log, fixed, keep
from grpo_jax.algo.segments import Sequences
from grpo_jax.algo.spec import LossConfig


class Tokens(NamedTuple):
    """The tokens of a step as the formulas see them: [N, T], every input 0 where not trained.

    Attributes:
      logp: log pi.
      old_logp: log pi_old, without gradient.
      log_ratio: d = logp - old_logp, clamped.
      advantages: A, without gradient.
      sequences: the mask, and which sequence a token is of.
    """

    logp: Array
    old_logp: Array
    log_ratio: Array
    advantages: Array
    sequences: Sequences

    @property
    def mask(self) -> Array:
        """Trained tokens, [N, T] bool."""
        return self.sequences.mask


def token_ratio(tokens: Tokens) -> Array:
    """rho = exp(d)."""
    return jnp.exp(tokens.log_ratio)


def sequence_ratio(tokens: Tokens) -> Array:
    """s = exp(mean of d over the sequence). GSPO, 2507.18071, equation 7."""
    return jnp.exp(tokens.sequences.mean(tokens.log_ratio))


def sequence_token_ratio(tokens: Tokens) -> Array:
    """Value s, gradient through the token's own logp. GSPO-token, 2507.18071, equation 14."""
    return fixed(sequence_ratio(tokens)) * jnp.exp(tokens.logp - fixed(tokens.logp))


RATIOS: dict[str, Callable[[Tokens], Array]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_token": sequence_token_ratio,
}
"""Ratios by level, [N, T] or [N, 1]; the keys are those of `spec.RatioLevel`."""

Bounds = tuple[float | None, float | None]
"""(low, high) of a weight; None is no bound."""


def inside(weight: Array, bounds: Bounds) -> Array:
    """Return whether low <= weight <= high, but for rounding."""
    low, high = bounds
    return ~(below(weight, low) | above(weight, high))


def tis(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """min(w, high): truncated importance sampling, by token."""
    return bound(jnp.exp(log_weight), *bounds)


def icepop(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """w where inside the bounds, else 0, by token. IcePop, 2510.18855."""
    weight = jnp.exp(log_weight)
    return keep(inside(weight, bounds), weight)


def seq_tis(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """min(W, high), W = exp(sum of log w over the sequence)."""
    return bound(jnp.exp(clamp_log(sequences.total(log_weight))), *bounds)


def seq_mask(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """W where inside the bounds, else 0; TRL's default."""
    weight = jnp.exp(clamp_log(sequences.total(log_weight)))
    return keep(inside(weight, bounds), weight)


def geo_tis(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """Bounded geometric mean of w over the sequence."""
    return bound(jnp.exp(sequences.mean(log_weight)), *bounds)


def geo_mask(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """Geometric mean of w over the sequence where inside the bounds, else 0."""
    weight = jnp.exp(sequences.mean(log_weight))
    return keep(inside(weight, bounds), weight)


def geo_gate(log_weight: Array, sequences: Sequences, bounds: Bounds) -> Array:
    """Token weight w where the sequence's geometric mean is inside the bounds, else 0; OpenRLHF's seq-mask-tis."""
    return keep(inside(jnp.exp(sequences.mean(log_weight)), bounds), jnp.exp(log_weight))


CORRECTIONS: dict[str, Callable[[Array, Sequences, Bounds], Array]] = {
    "tis": tis,
    "icepop": icepop,
    "seq_tis": seq_tis,
    "seq_mask": seq_mask,
    "geo_tis": geo_tis,
    "geo_mask": geo_mask,
    "geo_gate": geo_gate,
}
"""`f(log w [N, T], sequences, bounds) -> weight`, [N, T] or [N, 1]; the keys are those of `spec.Correction`."""


def sampler_weight(tokens: Tokens, sampler_logp: Array, config: LossConfig) -> Array | None:
    """Return the weight pi_old / pi_sampler that the correction gives, without gradient; None: no correction."""
    if config.correction is None:
        return None
    log_weight = clamp_log(tokens.old_logp - sampler_logp)
    weight = CORRECTIONS[config.correction](log_weight, tokens.sequences, config.correction_bounds)
    return fixed(jnp.broadcast_to(weight, tokens.logp.shape))


def not_vetoed(tokens: Tokens, sampler_logp: Array, veto: float) -> Array:
    """Return whether no token of the sequence has w = pi_old / pi_sampler below the veto."""
    weight = jnp.exp(clamp_log(tokens.old_logp - sampler_logp))
    return ~tokens.sequences.any(weight < veto * (1 - SLACK))


def not_off_policy(tokens: Tokens, sampler_logp: Array | None, threshold: float) -> Array:
    """Return whether A >= 0 or the sequence's mean of log(q / pi) is at most the threshold. 2512.02556."""
    behaviour = tokens.old_logp if sampler_logp is None else sampler_logp
    drift = tokens.sequences.mean(fixed(behaviour - tokens.logp))
    return ~((tokens.advantages < 0) & above(drift, threshold))
