"""What is left to draw from: penalties on logits, truncations of probabilities; no sort of the vocabulary."""

from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from grpo_jax.rollout.sampling import History, Sampling


def penalize(logits: jax.Array, rules: "Sampling", history: "History | None") -> jax.Array:
    """[B, V] float32 logits -> those after penalties, with -inf where nothing may be drawn.

    Raises:
        ValueError: the rules look back and there is no history.
    """
    if history is None and (rules.looks_back or rules.min_tokens):
        raise ValueError("history: got none, and penalties and min_tokens look back at the completion. Give it.")
    if history is not None and rules.looks_back:
        logits = _penalize_seen(logits, rules, history)
    if rules.banned_ids:
        logits = logits.at[:, jnp.asarray(rules.banned_ids)].set(-jnp.inf)
    if history is not None and rules.min_tokens and rules.stop_ids:
        stops = jnp.asarray(rules.stop_ids)
        early = (history.length < rules.min_tokens)[:, None]
        logits = logits.at[:, stops].set(jnp.where(early, -jnp.inf, logits[:, stops]))
    return logits


def _penalize_seen(logits: jax.Array, rules: "Sampling", history: "History") -> jax.Array:
    """Each seen token once, however often it was seen: every copy writes the same value, made from the first logits."""
    own, prompt = history.tokens, history.prompt
    columns = jnp.arange(own.shape[1])
    in_own = columns < history.length[:, None]
    in_prompt = jnp.arange(prompt.shape[1]) < history.prompt_len[:, None]
    rows = jnp.arange(logits.shape[0])[:, None]

    def write(logits: jax.Array, tokens: jax.Array, seen: jax.Array, values: jax.Array) -> jax.Array:
        return logits.at[rows, jnp.where(seen, tokens, logits.shape[1])].set(values, mode="drop")

    if rules.repetition_penalty != 1.0:
        tokens, seen = jnp.concatenate([prompt, own], axis=1), jnp.concatenate([in_prompt, in_own], axis=1)
        old = jnp.take_along_axis(logits, tokens, axis=1)
        new = jnp.where(old > 0, old / rules.repetition_penalty, old * rules.repetition_penalty)
        logits = write(logits, tokens, seen, new)
    if rules.presence_penalty:
        logits = write(logits, own, in_own, jnp.take_along_axis(logits, own, axis=1) - rules.presence_penalty)
    return logits


def truncate(weights: jax.Array, top_k: int | None, top_p: float | None, min_p: float | None) -> jax.Array:
    """Set to 0 what top-k, then top-p, then min-p leave out; each keeps what ties with the last it keeps.

    Args:
        weights: [B, V] float32 probabilities up to a factor a row, not negative.
        top_k: how many are kept; None is all.
        top_p: the share of what top-k left that is kept at least; None is all.
        min_p: the share of the largest that is needed (arXiv 2407.01082); None is none.

    Returns:
        [B, V] float32.
    """
    chex.assert_rank(weights, 2)
    if top_k is not None and top_k < weights.shape[-1]:
        kth = jax.lax.top_k(weights, top_k)[0][:, -1:]
        weights = jnp.where(weights >= kth, weights, 0.0)
    if top_p is not None and top_p < 1.0:
        weights = jnp.where(weights >= _mass_threshold(weights, top_p), weights, 0.0)
    if min_p is not None:
        weights = jnp.where(weights >= min_p * weights.max(-1, keepdims=True), weights, 0.0)
    return weights


def _mass_threshold(weights: jax.Array, share: float) -> jax.Array:
    """[B, V] -> [B, 1]: the largest value such that what is at least as large holds ``share`` of the total.

    By bisection over the bits of a float: those of numbers not negative are in their order.
    """
    wanted = share * weights.sum(-1, keepdims=True)

    def enough(bits: jax.Array) -> jax.Array:
        at_least = weights >= jax.lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(at_least, weights, 0.0).sum(-1, keepdims=True) >= wanted

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    largest = jax.lax.bitcast_convert_type(weights.max(-1, keepdims=True), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(largest), largest + 1))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
