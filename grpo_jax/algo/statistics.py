"""What is counted over the whole optimizer step, before its first microbatch (contract 5; MATH.md section 2)."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.arrays import ENTROPY_GRID, above, as_float, below, clamp_log, coarse, fixed, keep
from grpo_jax.algo.losses import ratio_bounds
from grpo_jax.algo.ratios import Tokens
from grpo_jax.algo.refusals import refuse
from grpo_jax.algo.segments import count_sequences, sequences
from grpo_jax.algo.spec import LossConfig


class Denominators(NamedTuple):
    """Counts and statistics of one optimizer step; all scalars, None where the config does not need them.

    Attributes:
      tokens: trained tokens.
      sequences: completions sampled for the step, those with nothing trained among them.
      entropy_threshold: least entropy, nat, that keeps the policy term (entropy_top).
      cov_mean_adv: mean advantage over the trained tokens (clip_cov, kl_cov).
      cov_mean_logp: mean logp over the trained tokens (clip_cov, kl_cov).
      kl_cov_threshold: least covariance among the tokens that kl_cov penalises.
      kl_cov_tie: (row id, position) of the last token penalised at that covariance; None: all of them.
      clip_cov_cut: largest draw among the tokens that clip_cov leaves out.
    """

    tokens: Array
    sequences: Array
    entropy_threshold: Array | None = None
    cov_mean_adv: Array | None = None
    cov_mean_logp: Array | None = None
    kl_cov_threshold: Array | None = None
    kl_cov_tie: tuple[Array, Array] | None = None
    clip_cov_cut: Array | None = None


class Choice(NamedTuple):
    """The tokens that a statistic of the step picks, [N, T] bool each; None where the config asks for none.

    Made once, over the whole step, and cut into microbatches like the batch: a threshold compared again with values
    of another compiled pass could fall on the other side of a token.

    Attributes:
      picked: left out by clip_cov, or penalised by kl_cov.
      kept: of entropy high enough to keep the policy term (entropy_top).
    """

    picked: Array | None = None
    kept: Array | None = None


class Identity(NamedTuple):
    """Who a token is, whatever row and column it lies in: [N, T] ints each, and the key of its draw.

    Attributes:
      row: id of its completion.
      position: its place in the completion's sequence.
      key: of the optimizer step; None: nothing is drawn.
    """

    row: Array
    position: Array
    key: Array | None = None

    def draws(self) -> Array:
        """Return a uniform in [0, 1) per token, [N, T] float32, addressed by (key, row, position)."""
        assert self.key is not None
        key = self.key

        def draw(row: Array, position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position), dtype=jnp.float32)

        return jax.vmap(jax.vmap(draw))(self.row, self.position)


def identity(shape: tuple[int, ...], row_ids: Array | None, positions: Array | None, key: Array | None) -> Identity:
    """Return the tokens' identities; the default row id is the row, the default position the column."""
    rows, columns = shape
    row = jnp.arange(rows) if row_ids is None else row_ids
    row = jnp.broadcast_to(row[:, None] if row.ndim == 1 else row, shape)
    position = jnp.broadcast_to(jnp.arange(columns) if positions is None else positions, shape)
    return Identity(row, position, key)


def prepare(
    logp: Array, old_logp: Array | None, advantages: Array, mask: Array, segments: Array | None = None
) -> Tokens:
    """Return the tokens of a step from its raw arrays: cast, and 0 wherever they are not trained.

    Raises:
      ValueError: advantages [N] with segments.
    """
    chex.assert_rank(logp, 2)
    chex.assert_equal_shape([logp, mask])
    if advantages.ndim == 1:
        if segments is not None:
            raise refuse(
                "advantages [N] with segments", "a row holds several sequences", "Give advantages [N, T], one per token"
            )
        advantages = jnp.broadcast_to(advantages[:, None], logp.shape)
    chex.assert_equal_shape([logp, advantages])
    of = sequences(mask, segments)
    logp = keep(of.mask, as_float(logp))
    old_logp = fixed(logp) if old_logp is None else keep(of.mask, fixed(as_float(old_logp)))
    chex.assert_equal_shape([logp, old_logp])
    return Tokens(logp, old_logp, clamp_log(logp - old_logp), keep(of.mask, fixed(as_float(advantages))), of)


def denominators(
    config: LossConfig,
    mask: Array,
    segments: Array | None = None,
    sequences: Array | int | None = None,
    *,
    logp: Array | None = None,
    old_logp: Array | None = None,
    advantages: Array | None = None,
    entropy: Array | None = None,
    key: Array | None = None,
    row_ids: Array | None = None,
    positions: Array | None = None,
) -> Denominators:
    """Count an optimizer step, before it is cut into microbatches.

    Args:
      config: the loss.
      mask: [N, T] bool, all trained tokens of the step.
      segments: [N, T] int, 0 for padding; None: a row is a sequence.
      sequences: completions sampled for the step, those filtered out among them; None: the rows, or the distinct
        segments, which must then be all.
      logp: [N, T], needed besides the mask for the statistics of clip_cov and kl_cov; recorded by the sampler or by
        the old_logp pass. Without it they are left out.
      old_logp: [N, T]; None: logp.
      advantages: [N] or [N, T], needed with logp.
      entropy: [N, T], needed for entropy_top's threshold. Without it that is left out.
      key: for clip_cov.
      row_ids: [N] or [N, T] int, as in `policy_loss`.
      positions: [N, T] int, as in `policy_loss`.

    Returns:
      The counts, int32, and what statistics the config needs and the arguments allow.
    """
    chex.assert_rank(mask, 2)
    counts = count(mask, segments, sequences)
    if config.entropy_top < 1 and entropy is not None:
        threshold = entropy_threshold(config, _trained(mask, segments), as_float(entropy))
        counts = counts._replace(entropy_threshold=threshold)
    if config.surrogate in ("clip_cov", "kl_cov") and logp is not None and advantages is not None:
        tokens = prepare(logp, old_logp, advantages, mask, segments)
        counts = covariance_statistics(config, tokens, counts, identity(mask.shape, row_ids, positions, key))
    return jax.tree.map(fixed, counts)


def choose(
    config: LossConfig,
    mask: Array,
    segments: Array | None = None,
    *,
    logp: Array,
    old_logp: Array | None = None,
    advantages: Array,
    entropy: Array | None = None,
    key: Array | None = None,
    row_ids: Array | None = None,
    positions: Array | None = None,
) -> Choice:
    """Return the tokens that clip_cov, kl_cov and entropy_top pick among all tokens of an optimizer step.

    Args:
      config: the loss.
      mask: [N, T] bool, all trained tokens of the step.
      segments: [N, T] int, 0 for padding; None: a row is a sequence.
      logp: [N, T], of the weights that are about to be updated.
      old_logp: [N, T]; None: logp.
      advantages: [N] or [N, T].
      entropy: [N, T], needed for entropy_top.
      key: for clip_cov.
      row_ids: [N] or [N, T] int, as in `policy_loss`.
      positions: [N, T] int, as in `policy_loss`.

    Returns:
      A `Choice`, its arrays [N, T], to be handed to `policy_loss` with each microbatch.
    """
    arrays = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "entropy": entropy}
    who = identity(mask.shape, row_ids, positions, key)
    step = denominators(config, mask, segments, **arrays, key=key, row_ids=row_ids, positions=positions)
    picked = chosen(config, prepare(logp, old_logp, advantages, mask, segments), step, who)
    kept = None
    if step.entropy_threshold is not None:
        assert entropy is not None
        kept = high_entropy(keep(_trained(mask, segments), as_float(entropy)), step.entropy_threshold)
    return Choice(picked, kept)


def count(mask: Array, segments: Array | None, sequences: Array | int | None = None) -> Denominators:
    """Return the counts alone."""
    if sequences is None:
        sequences = mask.shape[0] if segments is None else count_sequences(segments)
    return Denominators(jnp.sum(_trained(mask, segments), dtype=jnp.int32), jnp.asarray(sequences, jnp.int32))


def entropy_threshold(config: LossConfig, mask: Array, entropy: Array) -> Array:
    """Return the (1 - entropy_top) quantile of the trained tokens' rounded entropy, linearly interpolated."""
    ordered = jnp.sort(jnp.where(mask, _rounded(entropy), jnp.inf), axis=None)
    place = (1 - config.entropy_top) * jnp.maximum(jnp.sum(mask) - 1, 0).astype(entropy.dtype)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(jnp.sum(mask) - 1, 0))
    low, high = ordered[below], ordered[above]
    return jnp.where(high > low, low + (high - low) * (place - below), low)


def high_entropy(entropy: Array, threshold: Array) -> Array:
    """Return which tokens keep their policy term under entropy_top: rounded, their entropy is at least the threshold.

    Prompts and prefixes that samples share make whole blocks of tokens equal but for the last bit, which another
    program rounds otherwise.
    """
    return _rounded(entropy) >= threshold


def covariance(tokens: Tokens, step: Denominators) -> Array:
    """Return (A - mean A)(logp - mean logp), rounded and without gradient, [N, T]. 2505.22617."""
    assert step.cov_mean_adv is not None and step.cov_mean_logp is not None
    return coarse((tokens.advantages - step.cov_mean_adv) * (fixed(tokens.logp) - step.cov_mean_logp))


def covariance_statistics(config: LossConfig, tokens: Tokens, step: Denominators, who: Identity) -> Denominators:
    """Return `step` with the statistics of clip_cov or kl_cov that it lacks, from the tokens of the whole step."""
    total = jnp.maximum(jnp.sum(tokens.mask), 1)
    if step.cov_mean_adv is None:
        step = step._replace(cov_mean_adv=jnp.sum(tokens.advantages) / total)
    if step.cov_mean_logp is None:
        step = step._replace(cov_mean_logp=jnp.sum(fixed(tokens.logp)) / total)
    if config.surrogate == "clip_cov" and step.clip_cov_cut is None:
        _need_key(who)
        draws = jnp.sort(jnp.where(clip_cov_eligible(config, tokens, step), who.draws(), jnp.inf), axis=None)
        return step._replace(clip_cov_cut=draws[_last(config.clip_cov_share, step.tokens, draws.size)])
    if config.surrogate == "kl_cov" and step.kl_cov_threshold is None:
        falling = jnp.where(tokens.mask, -covariance(tokens, step), jnp.inf)
        ranked = jax.lax.sort((falling.ravel(), who.row.ravel(), who.position.ravel()), num_keys=3)
        last = _last(config.kl_cov_share, step.tokens, falling.size)
        return step._replace(kl_cov_threshold=-ranked[0][last], kl_cov_tie=(ranked[1][last], ranked[2][last]))
    return step


def clip_cov_eligible(config: LossConfig, tokens: Tokens, step: Denominators) -> Array:
    """Return which tokens clip_cov draws among: covariance within its bounds, and not clipped by ppo_clip."""
    low, high = ratio_bounds(config)
    ratio = jnp.exp(fixed(tokens.log_ratio))
    rose = (tokens.advantages > 0) & above(ratio, high)
    fell = (tokens.advantages < 0) & below(ratio, low)
    cov = covariance(tokens, step)
    return tokens.mask & ~rose & ~fell & (cov > config.clip_cov_low) & (cov < config.clip_cov_high)


def chosen(config: LossConfig, tokens: Tokens, step: Denominators, who: Identity) -> Array | None:
    """Return the tokens that clip_cov leaves out or kl_cov penalises, [N, T] bool; None for other surrogates."""
    if config.surrogate == "clip_cov" and step.clip_cov_cut is not None:
        _need_key(who)
        return clip_cov_eligible(config, tokens, step) & (who.draws() <= step.clip_cov_cut)
    if config.surrogate == "kl_cov" and step.kl_cov_threshold is not None:
        cov = covariance(tokens, step)
        tied = cov == step.kl_cov_threshold
        if step.kl_cov_tie is not None:
            row, position = step.kl_cov_tie
            tied &= (who.row < row) | ((who.row == row) & (who.position <= position))
        return tokens.mask & ((cov > step.kl_cov_threshold) | tied)
    return None


def _rounded(entropy: Array) -> Array:
    return jnp.round(entropy / ENTROPY_GRID) * ENTROPY_GRID


def _trained(mask: Array, segments: Array | None) -> Array:
    return mask if segments is None else mask & (segments != 0)


def _last(share: float, tokens: Array, size: int) -> Array:
    """Return the index of the last of max(1, floor(share of the tokens)) in an order of `size`."""
    count = jnp.floor(share * jnp.asarray(tokens, jnp.result_type(float))).astype(jnp.int32)
    return jnp.clip(count, 1, size) - 1


def _need_key(who: Identity) -> None:
    if who.key is None:
        raise refuse(
            "surrogate='clip_cov' without a key", "it draws the tokens it leaves out", "Give key, one per step"
        )
