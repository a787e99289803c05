"""Logits to tokens: one addressed uniform a token, inverted through the cumulative distribution in two levels."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
"""Tokens of the vocabulary whose probability is summed first; the draw picks a block, then a token in it."""


@dataclass(frozen=True)
class Sampling:
    """What is drawn from; static in jit.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens (and any that tie with the last of them); None keeps all.
        top_p: keep the fewest tokens whose probability reaches top_p (and any that tie); None keeps all.
        max_new_tokens: longest completion, its stop token included.
        stop_ids: tokens that end a completion and belong to it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}; it divides the logits. Use 0 for greedy, or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}; at least 1 token must remain. Use None to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}; it is a probability. Use a value in (0, 1], or None.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}; at least 1 token must be sampled.")


def row_keys(seed: int | jax.Array, round_: jax.Array, request_ids: jax.Array, num_samples: int) -> jax.Array:
    """Keys of all rows, each a function of (seed, round, request id, sample index) only.

    Args:
        seed: scalar below 2**32.
        round_: scalar uint32, the step (or the round within it) that samples.
        request_ids: [Q, 2] uint32, high and low half of each 64-bit request id.
        num_samples: G.

    Returns:
        [Q * G] typed keys, row q * G + g.
    """
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), round_)

    def row(request: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, request[0]), request[1]), sample)

    samples = jnp.arange(num_samples, dtype=jnp.uint32)
    return jax.vmap(lambda request: jax.vmap(lambda sample: row(request, sample))(samples))(request_ids).reshape(-1)


def split_ids(request_ids: list[int]) -> np.ndarray:
    """[Q, 2] uint32 halves of request ids below 2**64."""
    if any(not 0 <= i < 2**64 for i in request_ids):
        raise ValueError("request_ids: got one outside [0, 2**64); ids address the randomness. Use a row number.")
    ids = np.asarray(request_ids, dtype=np.uint64)
    return np.stack([ids >> np.uint64(32), ids & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def uniforms(keys: jax.Array, index: jax.Array) -> jax.Array:
    """Uniforms in [0, 1 - 2**-24], one a row, for the token at place ``index`` of each completion.

    Args:
        keys: [B] typed keys of the rows.
        index: [B] int32, how many tokens the completion already has.

    Returns:
        [B] float32.
    """
    bits = jax.vmap(lambda key, i: jax.random.bits(jax.random.fold_in(key, i), (), jnp.uint32))(keys, index)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def invert_cdf(weights: jax.Array, u: jax.Array) -> jax.Array:
    """The token at which the cumulative weight first exceeds ``u`` times the total; never one of weight 0.

    Args:
        weights: [B, V] float32, not negative, a positive one in each row.
        u: [B] float32 in [0, 1).

    Returns:
        [B] int32.
    """
    chex.assert_rank([weights, u], [2, 1])
    vocab = weights.shape[-1]
    blocks = -(-vocab // BLOCK)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - vocab))) if blocks > 1 else weights
    weights = weights.reshape(weights.shape[0], blocks, -1)
    sums = weights.sum(-1)  # [B, blocks]
    target = u * sums.sum(-1)
    block = _first_beyond(sums, target)
    before = jnp.where(jnp.arange(blocks) < block[:, None], sums, 0.0).sum(-1)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return (block * inside.shape[-1] + _first_beyond(inside, target - before)).astype(jnp.int32)


def _first_beyond(weights: jax.Array, target: jax.Array) -> jax.Array:
    """[B, n], [B] -> [B]: first positive weight whose running sum exceeds the target, else the last positive one."""
    positive = weights > 0
    beyond = positive & (jnp.cumsum(weights, -1) > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last)


def truncate(weights: jax.Array, sampling: Sampling) -> jax.Array:
    """Set to 0 what top-k, then top-p leave out.

    Args:
        weights: [B, V] float32 probabilities up to a factor a row.
        sampling: static.

    Returns:
        [B, V] float32; all of it when neither is set.
    """
    vocab = weights.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocab:
        kth = jax.lax.top_k(weights, sampling.top_k)[0][:, -1:]
        weights = jnp.where(weights >= kth, weights, 0.0)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered = -jnp.sort(-weights, axis=-1)
        before = jnp.cumsum(ordered, -1) - ordered
        kept = before < sampling.top_p * weights.sum(-1, keepdims=True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        weights = jnp.where(weights >= least, weights, 0.0)
    return weights


def sample(logits: jax.Array, u: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Draw one token a row.

    Args:
        logits: [B, V] float32.
        u: [B] float32 in [0, 1); not used when the temperature is 0.
        sampling: static.

    Returns:
        ([B] int32 tokens, [B] float32 log-probabilities in the tempered distribution before truncation; at
        temperature 0 in the distribution at temperature 1).
    """
    chex.assert_rank([logits, u], [2, 1])
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        token = invert_cdf(truncate(weights, sampling), u)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    logp = chosen - top - jnp.log(weights.sum(-1, keepdims=True))
    return token, logp[:, 0]
