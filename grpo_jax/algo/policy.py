"""The policy loss of one optimizer step or one of its microbatches (MATH.md sections 2 to 5)."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo import statistics
from grpo_jax.algo.aggregate import AGGREGATIONS, Step, masked_sum, token_mean
from grpo_jax.algo.arrays import as_float, fixed, keep
from grpo_jax.algo.kl import KL_ESTIMATORS
from grpo_jax.algo.losses import Inputs, surrogate_of
from grpo_jax.algo.ratios import RATIOS, Tokens, not_off_policy, not_vetoed, sampler_weight
from grpo_jax.algo.refusals import refuse
from grpo_jax.algo.spec import LossConfig
from grpo_jax.algo.statistics import Choice, Denominators, Identity

Metrics = dict[str, tuple[Array, Array]]
"""(sum, count) by name: both add over microbatches and hosts, and their quotient is the step's value."""


def policy_loss(
    logp: Array,
    old_logp: Array | None,
    advantages: Array,
    mask: Array,
    config: LossConfig,
    *,
    ref_logp: Array | None = None,
    sampler_logp: Array | None = None,
    entropy: Array | None = None,
    segments: Array | None = None,
    denominators: Denominators | None = None,
    key: Array | None = None,
    row_ids: Array | None = None,
    positions: Array | None = None,
    kl_coef: Array | float | None = None,
    entropy_coef: Array | float | None = None,
    choice: Choice | None = None,
) -> tuple[Array, Metrics]:
    """Return the loss to minimise and its metrics.

    Args:
      logp: [N, T] float, log pi of each token; what is differentiated. Nothing is read where the mask is False.
      old_logp: [N, T] log pi_old; None: the batch is trained once on the weights that sampled it, so logp itself.
      advantages: [N], or [N, T]; with segments [N, T]. Constant within a sequence for sequence levels, gmpo and vespo.
      mask: [N, T] bool, trained tokens.
      config: what to compute; static under jit.
      ref_logp: [N, T], needed iff the config has a KL in the loss.
      sampler_logp: [N, T], needed by a correction and by veto.
      entropy: [N, T] nat, needed by entropy_coef and entropy_top; the bonus' gradient flows through it.
      segments: [N, T] int, 0 for padding, for rows that hold several sequences; None: a row is a sequence.
      denominators: of the whole optimizer step, from `denominators`; None: these arguments are the whole step.
      key: of the optimizer step; needed by clip_cov without a choice.
      row_ids: [N] or [N, T] int, ids of completions, by which clip_cov draws and kl_cov breaks ties; None: the rows.
      positions: [N, T] int, each token's place in its sequence, likewise; None: the columns.
      kl_coef: in place of the config's, for a coefficient that changes from step to step.
      entropy_coef: in place of the config's, likewise.
      choice: what clip_cov, kl_cov and entropy_top pick in the whole step, from `choose`; None: picked here, by the
        statistics in `denominators` or from these arguments.

    Returns:
      (loss, metrics): a scalar, float32 (float64 for float64 inputs), and (sum, count) pairs. Losses of microbatches
      add up to that of the step.

    Raises:
      ValueError: an argument that the config needs is missing, or advantages [N] with segments.
    """
    _check(config, ref_logp, sampler_logp, entropy, kl_coef, entropy_coef)
    tokens = statistics.prepare(logp, old_logp, advantages, mask, segments)
    ref_logp, sampler_logp, entropy = (_trained(x, tokens) for x in (ref_logp, sampler_logp, entropy))
    who = statistics.identity(tokens.mask.shape, row_ids, positions, key)
    counts = statistics.count(mask, segments) if denominators is None else denominators
    if choice is None:
        counts = _with_statistics(config, tokens, counts, entropy, who)
        choice = _choice(config, tokens, counts, entropy, who)
    step = Step(tokens.sequences, counts.tokens, counts.sequences, config.max_completion_len)

    aggregate = AGGREGATIONS[config.aggregation]
    term, metrics = _policy_term(config, tokens, choice, sampler_logp)
    loss = policy = _quotient(aggregate(term, step))
    trained = jnp.sum(tokens.mask).astype(loss.dtype)
    if ref_logp is not None:
        kl = KL_ESTIMATORS[config.kl_estimator](ref_logp - tokens.logp, jnp.exp(tokens.log_ratio))
        metrics["kl"] = masked_sum(kl, tokens.mask)
        if _has_kl(config, kl_coef):
            loss = loss + (config.kl_coef if kl_coef is None else kl_coef) * _quotient(aggregate(kl, step))
    if entropy is not None:
        metrics["entropy"] = masked_sum(entropy, tokens.mask)
        if config.entropy_coef != 0 or entropy_coef is not None:
            bonus = _quotient(token_mean(entropy, step))
            loss = loss - (config.entropy_coef if entropy_coef is None else entropy_coef) * bonus
    # A loss is already divided by the step's count, so its count is the share of the step's tokens at hand.
    share = trained / jnp.maximum(counts.tokens, 1)
    pairs = {"loss": (loss, share), "policy_loss": (policy, share)}
    pairs |= {name: (total.astype(loss.dtype), trained) for name, total in metrics.items()}
    if ref_logp is not None:  # what adaptive_kl steers by
        pairs["kl_per_sequence"] = (masked_sum(tokens.logp - ref_logp, tokens.mask), share * counts.sequences)
    return loss, jax.tree.map(fixed, pairs)


def _policy_term(
    config: LossConfig,
    tokens: Tokens,
    choice: Choice,
    sampler_logp: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """Return the surrogate [N, T], corrected and with what is rejected at 0, and sums for the metrics."""
    mask = tokens.mask
    ratio = RATIOS[config.ratio_level](tokens)
    weight = None if sampler_logp is None else sampler_weight(tokens, sampler_logp, config)
    term = surrogate_of(config)(Inputs(tokens, ratio, weight, choice.picked), config)
    loss, kept = term.loss, jnp.ones(mask.shape, bool)
    metrics = {
        "ratio": masked_sum(jnp.broadcast_to(ratio, mask.shape), mask),
        "approx_kl": masked_sum(jnp.expm1(tokens.log_ratio) - tokens.log_ratio, mask),
        "clip_ratio/low": jnp.sum(mask & term.low),
        "clip_ratio/high": jnp.sum(mask & term.high),
        "clip_ratio/region": jnp.sum(mask & (term.low | term.high)),
    }
    if weight is not None:
        if config.surrogate != "vespo":  # there the weight is inside the term, and drops no token by itself
            loss = loss * weight
            kept &= weight > 0
        metrics["is_weight"] = masked_sum(weight, mask)
    if config.veto is not None and sampler_logp is not None:
        kept &= not_vetoed(tokens, sampler_logp, config.veto)
    if config.off_policy_threshold is not None:
        kept &= not_off_policy(tokens, sampler_logp, config.off_policy_threshold)
    metrics["rejected"] = jnp.sum(mask & ~kept)
    if choice.kept is not None:
        kept &= choice.kept
    return keep(kept, loss), metrics


def _with_statistics(
    config: LossConfig, tokens: Tokens, counts: Denominators, entropy: Array | None, who: Identity
) -> Denominators:
    """Return the counts with the statistics that the config needs and they lack, from the tokens at hand."""
    if config.entropy_top < 1 and entropy is not None and counts.entropy_threshold is None:
        threshold = statistics.entropy_threshold(config, tokens.mask, fixed(entropy))
        counts = counts._replace(entropy_threshold=threshold)
    if config.surrogate in ("clip_cov", "kl_cov"):
        counts = statistics.covariance_statistics(config, tokens, counts, who)
    return counts


def _choice(config: LossConfig, tokens: Tokens, counts: Denominators, entropy: Array | None, who: Identity) -> Choice:
    """Return what the statistics pick among the tokens at hand."""
    threshold = counts.entropy_threshold
    kept = None if entropy is None or threshold is None else statistics.high_entropy(fixed(entropy), threshold)
    return Choice(statistics.chosen(config, tokens, counts, who), kept if config.entropy_top < 1 else None)


def _trained(x: Array | None, tokens: Tokens) -> Array | None:
    if x is None:
        return None
    chex.assert_equal_shape([x, tokens.logp])
    return keep(tokens.mask, as_float(x))


def _quotient(pair: tuple[Array, Array]) -> Array:
    return pair[0] / pair[1].astype(pair[0].dtype)


def _has_kl(config: LossConfig, kl_coef: Array | float | None) -> bool:
    return config.kl_in_loss or (kl_coef is not None and not config.kl_in_reward)


def _check(
    config: LossConfig,
    ref_logp: Array | None,
    sampler_logp: Array | None,
    entropy: Array | None,
    kl_coef: Array | float | None,
    entropy_coef: Array | float | None,
) -> None:
    """Refuse arguments that the config needs and that are missing."""
    if ref_logp is None and _has_kl(config, kl_coef):
        raise refuse(
            f"kl_coef={config.kl_coef!r} without ref_logp", "the KL is to the reference model", "Give ref_logp [N, T]"
        )
    if sampler_logp is None and (config.correction is not None or config.veto is not None):
        raise refuse(
            f"correction={config.correction!r}, veto={config.veto!r} without sampler_logp",
            "the weight is pi_old / pi_sampler",
            "Give sampler_logp [N, T]",
        )
    if entropy is None and (config.entropy_coef != 0 or config.entropy_top < 1 or entropy_coef is not None):
        raise refuse(
            f"entropy_coef={config.entropy_coef!r}, entropy_top={config.entropy_top!r} without entropy",
            "they are about the entropy of each token",
            "Give entropy [N, T]",
        )
