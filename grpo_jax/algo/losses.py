"""Surrogates: per-token terms of the policy loss, to be minimised (MATH.md section 3).

Every surrogate has the signature `f(inputs, config) -> Term`, where the ratio in `inputs` is of the config's level.
A is the advantage, rho the ratio; at a tie with a bound, or nearly, the unclipped branch has the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import LOG_RATIO_LIMIT, above, below, bound, fixed, keep, magnitude
from grpo_jax.algo.ratios import Tokens
from grpo_jax.algo.spec import LossConfig

LOG_WEIGHT_FLOOR = math.log(1e-8)
"""Least log-weight that vespo knows."""


class Inputs(NamedTuple):
    """What a surrogate sees.

    Attributes:
      tokens: the step's tokens.
      ratio: rho of the config's level, [N, T] or [N, 1].
      weight: the sampler correction's weight [N, T], for vespo; None: no correction.
      chosen: [N, T] bool, the tokens that clip_cov leaves out or kl_cov penalises; None for the others.
    """

    tokens: Tokens
    ratio: Array
    weight: Array | None = None
    chosen: Array | None = None


class Term(NamedTuple):
    """A surrogate's result.

    Attributes:
      loss: [N, T], to be minimised.
      low: where the lower clip bound acts, [N, T] bool.
      high: where the upper clip bound acts, [N, T] bool.
    """

    loss: Array
    low: Array
    high: Array


def reinforce(inputs: Inputs, config: LossConfig) -> Term:
    """-A log pi. Williams 1992."""
    tokens = inputs.tokens
    return _unclipped(-tokens.advantages * tokens.logp)


def ppo_clip(inputs: Inputs, config: LossConfig) -> Term:
    """-A min(rho, 1 + clip_high) for A >= 0, -A max(rho, 1 - clip_low) for A < 0. 1707.06347; DAPO 2503.14476.

    For A < 0 `delta` (2505.07291) and `dual_clip` (1912.09729) bound rho from above: two names for one bound.
    """
    advantages, ratio = inputs.tokens.advantages, inputs.ratio
    low, high = ratio_bounds(config)
    cap = config.dual_clip if config.delta is None else config.delta
    gain = advantages >= 0
    clipped = jnp.where(gain, bound(ratio, None, high), bound(ratio, low, cap))
    return Term(-advantages * clipped, ~gain & below(ratio, low), (advantages > 0) & above(ratio, high))


def cispo(inputs: Inputs, config: LossConfig) -> Term:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi: clipped tokens keep their gradient. 2506.13585."""
    tokens = inputs.tokens
    low, high = ratio_bounds(config)
    weight = fixed(bound(inputs.ratio, low, high))
    return Term(-weight * tokens.advantages * tokens.logp, below(inputs.ratio, low), above(inputs.ratio, high))


def sapo(inputs: Inputs, config: LossConfig) -> Term:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A; the slope at rho = 1 is -A. 2511.20347."""
    advantages = inputs.tokens.advantages
    tau = jnp.where(advantages > 0, config.sapo_tau_pos, config.sapo_tau_neg).astype(advantages.dtype)
    return _unclipped(-(4 / tau) * jax.nn.sigmoid(tau * (inputs.ratio - 1)) * advantages)


def gmpo(inputs: Inputs, config: LossConfig) -> Term:
    """-A exp(mean over the sequence of the log-ratio, clipped on the side A pushes it to). 2507.20673."""
    tokens = inputs.tokens
    gain = tokens.advantages >= 0
    low = None if config.clip_low is None else -config.clip_low
    clipped = jnp.where(gain, bound(tokens.log_ratio, None, config.clip_high), bound(tokens.log_ratio, low, None))
    loss = -tokens.advantages * jnp.exp(tokens.sequences.mean(clipped))
    return Term(
        loss,
        (tokens.advantages < 0) & below(tokens.log_ratio, low),
        (tokens.advantages > 0) & above(tokens.log_ratio, config.clip_high),
    )


def vespo(inputs: Inputs, config: LossConfig) -> Term:
    """-phi A log pi, phi = sg(exp(lambda + k log W - lambda W)), W the weight of the whole sequence. 2602.10693."""
    tokens = inputs.tokens
    log_weight = tokens.log_ratio
    if inputs.weight is not None:
        seen = jnp.where(inputs.weight > 0, inputs.weight, 1)
        correction = jnp.where(inputs.weight > 0, jnp.log(seen), LOG_WEIGHT_FLOOR)
        log_weight = log_weight + bound(correction, LOG_WEIGHT_FLOOR, LOG_RATIO_LIMIT)
    log_weight = bound(tokens.sequences.total(log_weight), LOG_WEIGHT_FLOOR, LOG_RATIO_LIMIT)
    gain = tokens.advantages >= 0
    k = jnp.where(gain, config.vespo_k_pos, config.vespo_k_neg).astype(log_weight.dtype)
    decay = jnp.where(gain, config.vespo_lambda_pos, config.vespo_lambda_neg).astype(log_weight.dtype)
    phi = fixed(jnp.exp(decay + k * log_weight - decay * jnp.exp(log_weight)))
    return _unclipped(-phi * tokens.advantages * tokens.logp)


def clip_cov(inputs: Inputs, config: LossConfig) -> Term:
    """ppo_clip, but 0 on the chosen tokens, drawn from those of high covariance. 2505.22617."""
    assert inputs.chosen is not None
    term = ppo_clip(inputs, config)
    return term._replace(loss=keep(~inputs.chosen, term.loss))


def kl_cov(inputs: Inputs, config: LossConfig) -> Term:
    """-rho A, plus kl_cov_coef |log rho| on the chosen tokens, those of largest covariance. 2505.22617."""
    assert inputs.chosen is not None
    penalty = config.kl_cov_coef * magnitude(inputs.tokens.log_ratio)
    return _unclipped(-inputs.ratio * inputs.tokens.advantages + keep(inputs.chosen, penalty))


def dppo(inputs: Inputs, config: LossConfig) -> Term:
    """-sg(keep min(rho, 20)) A log pi; dropped is what moved too far with A, in probability. 2602.04879."""
    tokens = inputs.tokens
    moved = fixed(jnp.exp(tokens.logp) - jnp.exp(tokens.old_logp))
    low = (tokens.advantages < 0) & below(moved, None if config.clip_low is None else -config.clip_low)
    high = (tokens.advantages > 0) & above(moved, config.clip_high)
    weight = keep(~(low | high), fixed(bound(inputs.ratio, None, 20.0)))
    return Term(-weight * tokens.advantages * tokens.logp, low, high)


def ratio_bounds(config: LossConfig) -> tuple[float | None, float | None]:
    """Return (1 - clip_low, 1 + clip_high), None for no bound."""
    return (
        None if config.clip_low is None else 1 - config.clip_low,
        None if config.clip_high is None else 1 + config.clip_high,
    )


def _unclipped(loss: Array) -> Term:
    nowhere = jnp.zeros(loss.shape, bool)
    return Term(loss, nowhere, nowhere)


SURROGATES: dict[str, Callable[[Inputs, LossConfig], Term]] = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "dppo": dppo,
}
"""Surrogates by name; the keys are those of `spec.Surrogate`."""


def surrogate_of(config: LossConfig) -> Callable[[Inputs, LossConfig], Term]:
    """Return the config's surrogate: a row of the table, or the user's own function with no clip to report."""
    own = config.surrogate
    if isinstance(own, str):
        return SURROGATES[own]
    return lambda inputs, config: _unclipped(own(inputs, config))
