"""Advantages: rewards of groups [Q, G] to advantages [Q, G] (MATH.md section 1).

Every estimator has the signature `f(rewards, valid, options) -> advantages`, all [Q, G] (gdpo: rewards [F, Q, G]).
`valid` is the samples that were scored; those that were not count nowhere. Whether a group has spread is decided by
comparing its largest and smallest reward, never by what a subtraction left over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo import best_of_k
from grpo_jax.algo.arrays import as_float, fixed, keep, root
from grpo_jax.algo.refusals import check_name, refuse
from grpo_jax.algo.spec import Estimator

WHITEN_EPS = 1e-8
"""Added to the standard deviation where a batch is whitened."""


class Options(NamedTuple):
    """What some estimators need besides the rewards; an estimator that lacks what it needs raises ValueError.

    Attributes:
      lengths: [Q, G] completion tokens with the stop token, before any filter (opo; reinforce_pp with token weights).
      greedy: [Q] reward of the greedy completion, NaN for none (remax).
      k: the k of pass_at_k.
      weights: [F] weights of the reward functions (gdpo), or "tokens": reinforce_pp weighs samples by their length.
      ddof: degrees of freedom taken from the count in standard deviations, 1 or 0.
      eps: added to standard deviations, in units of reward.
    """

    lengths: Array | None = None
    greedy: Array | None = None
    k: int | None = None
    weights: Array | str | None = None
    ddof: int = 1
    eps: float = 1e-4


def spread(x: Array, valid: Array, axis: int | None = -1) -> Array:
    """Return whether the valid values along `axis` (None: all) are not all equal; reduced axes are kept."""
    high = jnp.max(jnp.where(valid, x, -jnp.inf), axis=axis, keepdims=True)
    low = jnp.min(jnp.where(valid, x, jnp.inf), axis=axis, keepdims=True)
    return high > low


def has_spread(rewards: Array, valid: Array | None = None) -> Array:
    """Return which groups have rewards that differ: DAPO's dynamic sampling keeps these (2503.14476).

    Args:
      rewards: [Q, G] float, unshaped; NaN is not scored.
      valid: [Q, G] bool, the samples there are; None: all.

    Returns:
      [Q] bool, max > min over the scored samples.
    """
    chex.assert_rank(rewards, 2)
    rewards, scored = _scored(rewards, valid)
    return spread(rewards, scored)[:, 0]


class Moments(NamedTuple):
    """Mean, values minus the mean and standard deviation, the latter two in units of `unit`, a power of two."""

    mean: Array
    centred: Array
    std: Array
    unit: Array


def moments(x: Array, valid: Array, axis: int | None = -1, ddof: int = 1, weights: Array | None = None) -> Moments:
    """Return the moments of the valid values along `axis` (None: all), for any finite values.

    Values are divided by a power of two that bounds them within a factor of 4, which is exact, and deviations by the
    largest of them before they are squared: nothing overflows, and nothing of use underflows.
    """
    share = jnp.where(valid, 1.0 if weights is None else weights, 0.0).astype(x.dtype)
    x = keep(valid, x)
    # The unit's reciprocal must be a normal number: XLA may multiply by it, and flushes what is smaller to 0.
    exponent = jnp.frexp(fixed(jnp.max(jnp.abs(x), axis=axis, keepdims=True)))[1]
    unit = jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent, 0, -jnp.finfo(x.dtype).minexp))
    total = jnp.sum(share, axis=axis, keepdims=True)
    mean = jnp.sum(x / unit * share, axis=axis, keepdims=True) / jnp.maximum(total, 1)
    centred = keep(valid, x / unit - mean)
    scale = fixed(jnp.max(jnp.abs(centred), axis=axis, keepdims=True))
    scale = jnp.where(scale == 0, 1, scale)
    squares = jnp.sum(share * jnp.square(centred / scale), axis=axis, keepdims=True)
    std = scale * root(squares / jnp.maximum(total - ddof, 1))
    return Moments(mean * unit, centred, std, unit)


def whiten(
    x: Array, mask: Array | None = None, *, weights: Array | None = None, ddof: int = 1, eps: float = WHITEN_EPS
) -> Array:
    """Return (x - mean) / (std + eps) over all values under the mask, 0 elsewhere and where they do not differ.

    Args:
      x: float, any shape.
      mask: bool, as x; None: all.
      weights: as x, at least 0: the weight of each value in mean, variance and count; None: 1.
      ddof: degrees of freedom taken from the count, 1 or 0.
      eps: added to the standard deviation.

    Returns:
      As x, float32 (float64 for float64).
    """
    x = as_float(x)
    mask = jnp.ones(x.shape, bool) if mask is None else mask
    chex.assert_equal_shape([x, mask])
    counted = mask if weights is None else mask & (weights > 0)
    stats = moments(keep(mask, x), counted, None, ddof, weights)
    centred = keep(mask, x) / stats.unit - stats.mean / stats.unit
    return keep(mask & spread(x, counted, None), centred / (stats.std + eps / stats.unit))


def raw(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r. Williams 1992."""
    return rewards


def batch_mean(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - mean over the batch; one sample per prompt is the normal case."""
    return keep(spread(rewards, valid, None), _centred(rewards, valid, None))


def grpo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (r - mean_g) / (std_g + eps). GRPO, 2402.03300."""
    stats = moments(rewards, valid, ddof=options.ddof)
    return keep(spread(rewards, valid), stats.centred / (stats.std + options.eps / stats.unit))


def dr_grpo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - mean_g. Dr. GRPO, 2503.20783."""
    return keep(spread(rewards, valid), _centred(rewards, valid))


def lite_ppo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (r - mean_g) / (std of r over the batch + eps). Lite PPO, 2508.08221."""
    group, batch = moments(rewards, valid), moments(rewards, valid, None, options.ddof)
    scaled = group.centred * (group.unit / batch.unit)
    return keep(spread(rewards, valid), scaled / (batch.std + options.eps / batch.unit))


def rloo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - mean of the others = G/(G - 1) (r - mean_g). RLOO, 2402.14740."""
    count = jnp.sum(valid, axis=-1, keepdims=True)
    return dr_grpo(rewards, valid, options) * (count / jnp.maximum(count - 1, 1)).astype(rewards.dtype)


def reinforce_pp(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r whitened over the batch. REINFORCE++, 2501.03262."""
    return whiten(rewards, valid, weights=_sample_weights(options, "reinforce_pp"), ddof=options.ddof)


def reinforce_pp_baseline(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - mean_g whitened over the batch. REINFORCE++-baseline, 2501.03262."""
    weights = _sample_weights(options, "reinforce_pp_baseline")
    centred = dr_grpo(rewards, valid, options)
    return keep(spread(rewards, valid), whiten(centred, valid, weights=weights, ddof=options.ddof))


def remax(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - reward of the prompt's greedy completion; 0 for a group whose greedy completion has none. 2310.10505."""
    if options.greedy is None:
        raise refuse(
            "estimator='remax' without greedy",
            "its baseline is the reward of one greedy completion per prompt",
            "Give greedy [Q], NaN where a prompt has none",
        )
    greedy = as_float(options.greedy)
    chex.assert_shape(greedy, (rewards.shape[0],))
    answered = ~jnp.isnan(greedy)
    return keep(answered[:, None], rewards - keep(answered, greedy)[:, None])


def opo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = r - sum(len r) / sum(len), the variance-optimal baseline; sum(len) = 0: the mean. OPO, 2505.23585."""
    lengths = keep(valid, _lengths(options, "opo", rewards))
    weights = jnp.where(jnp.any(lengths > 0, axis=-1, keepdims=True), lengths, valid)
    share = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
    stats = moments(rewards, valid)
    offset = jnp.sum(share * stats.centred, axis=-1, keepdims=True)
    return keep(spread(rewards, valid), (stats.centred - offset) * stats.unit)


def gpg(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (r - mean_g) B / (scored samples in groups with spread), B all scored samples. GPG, 2504.02546."""
    useful = jnp.sum(valid & spread(rewards, valid))
    factor = jnp.sum(valid) / jnp.maximum(useful, 1)
    return dr_grpo(rewards, valid, options) * factor.astype(rewards.dtype)


def maxrl(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (r - mean_g) / mean_g where mean_g > eps, else 0; for rewards of at least 0. MaxRL, 2602.02710."""
    stats = moments(rewards, valid)
    usable = stats.mean > options.eps
    mean = jnp.where(usable, stats.mean, 1) / stats.unit
    return keep(spread(rewards, valid) & usable, stats.centred / mean)


def pass_at_k(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (mean best-of-k over the subsets with the sample - over all) / (std + eps). Analytic, 2508.10751."""
    if options.k is None:
        raise refuse("estimator='pass_at_k' without k", "it is about the best of k samples", "Give k")
    if not 1 <= options.k <= rewards.shape[-1]:
        raise refuse(
            f"k={options.k} with groups of {rewards.shape[-1]}",
            "a subset of k samples must fit into the group",
            "Choose 1 <= k <= G",
        )
    unit = moments(rewards, valid).unit
    return best_of_k.advantages(rewards / unit, valid, options.k, options.eps / unit)


def gdpo(rewards: Array, valid: Array, options: Options) -> Array:
    """A = (S - mean S) / (std S + eps) over the batch, S = sum_f w_f grpo(r_f). GDPO, 2601.05242.

    `rewards` [F, Q, G] with `valid` of the same shape: what each function scored.
    """
    chex.assert_rank(rewards, 3)
    if isinstance(options.weights, str):
        raise refuse(f"weights={options.weights!r} with gdpo", "it weighs reward functions", "Give weights [F] or None")
    weights = jnp.ones(rewards.shape[0]) if options.weights is None else as_float(options.weights)
    chex.assert_shape(weights, rewards.shape[:1])
    each = grpo(rewards, valid, options)
    total = jnp.tensordot(weights.astype(each.dtype), each, axes=1)
    scored = jnp.any(valid, axis=0)
    return keep(spread(total, scored), whiten(total, scored, ddof=options.ddof, eps=options.eps))


def group_advantages(
    rewards: Array,
    *,
    estimator: Estimator | Callable[[Array, Array, Options], Array] = "grpo",
    valid: Array | None = None,
    lengths: Array | None = None,
    greedy: Array | None = None,
    k: int | None = None,
    weights: Array | str | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Array:
    """Return the advantages of groups of completions (MATH.md section 1).

    Args:
      rewards: [Q, G] float, after weighting; for gdpo [F, Q, G], one per reward function. NaN: not scored.
      estimator: a key of `ADVANTAGES`, or a function of the same signature: rewards [Q, G] with 0 for what was not
        scored, scored [Q, G] and `Options` to advantages [Q, G], pure and traceable.
      valid: [Q, G] bool, the samples there are, for ragged groups (gdpo: or [F, Q, G]); None: all.
      lengths: [Q, G] completion tokens with the stop token, before any filter. Needed by opo and by weights="tokens".
      greedy: [Q] reward of each prompt's greedy completion, NaN for none. Needed by remax.
      k: 1 <= k <= G. Needed by pass_at_k.
      weights: gdpo: [F] weights of the reward functions (None: 1). reinforce_pp and reinforce_pp_baseline: "tokens"
        weighs each sample by its length in the batch's mean and variance (None: one sample, one weight).
      ddof: 1 or 0, taken from the count in standard deviations.
      eps: added to standard deviations, in units of reward.

    Returns:
      [Q, G] float32 (float64 for float64 rewards), finite for finite rewards, 0 for samples that were not scored.

    Raises:
      ValueError: an unknown estimator, or one that lacks an argument it needs.
    """
    if estimator == "gae":
        raise refuse(
            "estimator='gae'", "it is made of a critic's values, token by token", "Call algo.gae with values [N, T]"
        )
    if isinstance(estimator, str):
        check_name("estimator", estimator, Estimator)
    if ddof not in (0, 1):
        raise refuse(f"ddof={ddof!r}", "a standard deviation takes 0 or 1 from the count", "Use 1 or 0")
    if isinstance(weights, str) and weights != "tokens":
        raise refuse(f"weights={weights!r}", "there is no such weighting", 'Use "tokens", an array [F] or None')
    chex.assert_rank(rewards, 3 if estimator == "gdpo" else 2)
    rewards, scored = _scored(rewards, valid)
    options = Options(lengths, greedy, k, weights, ddof, eps)
    advantages = (ADVANTAGES[estimator] if isinstance(estimator, str) else estimator)(rewards, scored, options)
    limit = jnp.finfo(advantages.dtype).max
    return keep(jnp.any(scored, axis=0) if scored.ndim == 3 else scored, jnp.clip(advantages, -limit, limit))


def _scored(rewards: Array, valid: Array | None) -> tuple[Array, Array]:
    """Return rewards with 0 for what was not scored, and which were."""
    rewards = as_float(rewards)
    scored = ~jnp.isnan(rewards) if valid is None else valid & ~jnp.isnan(rewards)
    chex.assert_equal_shape([rewards, scored])
    return keep(scored, rewards), scored


def _centred(rewards: Array, valid: Array, axis: int | None = -1) -> Array:
    """Return rewards minus their mean, held within the range of their dtype."""
    stats = moments(rewards, valid, axis)
    limit = jnp.finfo(rewards.dtype).max / stats.unit
    return jnp.clip(stats.centred, -limit, limit) * stats.unit


def _lengths(options: Options, estimator: str, like: Array) -> Array:
    if options.lengths is None:
        raise refuse(f"estimator={estimator!r} without lengths", "they weigh its samples", "Give lengths [Q, G]")
    chex.assert_shape(options.lengths, like.shape)
    return as_float(options.lengths).astype(like.dtype)


def _sample_weights(options: Options, estimator: str) -> Array | None:
    """Return the lengths if samples are weighed by tokens, None if each counts once."""
    if isinstance(options.weights, str):
        if options.lengths is None:
            raise refuse('weights="tokens" without lengths', "they are the weights", "Give lengths [Q, G]")
        return as_float(options.lengths)
    return None


ADVANTAGES: dict[str, Callable[[Array, Array, Options], Array]] = {
    "raw": raw,
    "batch_mean": batch_mean,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "lite_ppo": lite_ppo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
    "opo": opo,
    "gpg": gpg,
    "maxrl": maxrl,
    "pass_at_k": pass_at_k,
    "gdpo": gdpo,
}
"""Estimators by name; the keys are those of `spec.Estimator`."""
