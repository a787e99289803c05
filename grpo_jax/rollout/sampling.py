"""Logits to tokens: one addressed uniform a token, inverted through the cumulative distribution in two levels."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.rollout.truncation import penalize, truncate

BLOCKS = (256, 128, 64)
"""Tokens of the vocabulary whose probability is summed first; the draw picks a block, then a token in it. Of these
the first that divides the vocabulary, else the first of all: padding is a pass over all probabilities."""


@dataclass(frozen=True)
class Sampling:
    """What is drawn from: penalties, then the temperature, then what the truncations leave.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens (and any that tie with the last of them); None keeps all.
        top_p: keep the fewest tokens whose probability reaches top_p (and any that tie); None keeps all.
        max_new_tokens: longest completion, its stop token included.
        stop_ids: tokens that end a completion and belong to it.
        min_p: keep the tokens at least this share as likely as the likeliest; None keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the text so far
            (arXiv 1909.05858); 1 is none.
        presence_penalty: is taken from the logits of tokens in the completion so far; 0 is none.
        min_tokens: no stop token or stop string ends a completion before so many tokens.
        stop_strings: texts that end a completion, with the token that completes them.
        banned_ids: tokens never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        for name, (wrong, why) in self._wrong().items():
            if wrong:
                raise ValueError(f"{name}: got {getattr(self, name)}; {why}")

    def _wrong(self) -> dict[str, tuple[bool, str]]:
        return {
            "temperature": (not 0 <= self.temperature < np.inf, "it divides the logits. Use 0 for greedy, or more."),
            "top_k": (self.top_k is not None and self.top_k < 1, "at least 1 token must remain. Use None to keep all."),
            "top_p": (
                self.top_p is not None and not 0 < self.top_p <= 1,
                "it is a probability. Use a value in (0, 1], or None.",
            ),
            "max_new_tokens": (self.max_new_tokens < 1, "at least 1 token must be sampled."),
            "min_p": (
                self.min_p is not None and not 0 < self.min_p <= 1,
                "it is a share of the largest probability. Use a value in (0, 1], or None.",
            ),
            "repetition_penalty": (not 0 < self.repetition_penalty < np.inf, "it divides logits. Use 1 for none."),
            "presence_penalty": (not np.isfinite(self.presence_penalty), "it is taken from logits. Use 0 for none."),
            "min_tokens": (
                not 0 <= self.min_tokens <= self.max_new_tokens,
                f"a completion has 1 to {self.max_new_tokens} tokens. Use 0 for no lower limit.",
            ),
            "stop_strings": ("" in self.stop_strings, "every text holds the empty one. Leave it out."),
        }

    def check(self, vocab: int) -> None:
        """Raise ValueError where nothing could be drawn from a vocabulary of this size, or an id lies outside it."""
        for name, ids in (("stop_ids", self.stop_ids), ("banned_ids", self.banned_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"{name}: got {ids}, and the model knows 0 to {vocab - 1}. Use this model's tokens.")
        never = {*self.banned_ids, *(self.stop_ids if self.min_tokens else ())}
        if len(never) == vocab:
            raise ValueError(f"banned_ids: got all {vocab} tokens, those that stop included; leave one to draw.")

    @property
    def rules(self) -> "Sampling":
        """What a compiled program depends on; temperature and lengths are its arguments."""
        return replace(self, temperature=1.0, max_new_tokens=max(1, self.min_tokens), stop_strings=())

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it other than through the model."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0

    @property
    def changed(self) -> bool:
        """Whether what is drawn from is another distribution than the tempered one."""
        bounds = (self.top_k, self.top_p, self.min_p)
        return self.looks_back or self.min_tokens > 0 or bool(self.banned_ids) or any(x is not None for x in bounds)


def address_keys(address: jax.Array, round_: jax.Array) -> jax.Array:
    """Keys of rows, each a function of (seed, round, request id, sample index) only.

    Args:
        address: [B, 4] uint32: seed, high and low half of the 64-bit request id, sample index.
        round_: scalar uint32, the step (or the round within it) that samples.

    Returns:
        [B] typed keys.
    """

    def row(seed: jax.Array, high: jax.Array, low: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")
        for part in (round_, high, low, sample):
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(row)(*address.T)


def row_keys(seed: int | jax.Array, round_: jax.Array, request_ids: jax.Array, num_samples: int) -> jax.Array:
    """`address_keys` of G samples of each request.

    Args:
        seed: scalar below 2**32.
        round_: scalar uint32.
        request_ids: [Q, 2] uint32, from `split_ids`.
        num_samples: G.

    Returns:
        [Q * G] typed keys, row q * G + g.
    """
    ids = jnp.repeat(jnp.asarray(request_ids, jnp.uint32), num_samples, axis=0)
    samples = jnp.tile(jnp.arange(num_samples, dtype=jnp.uint32), len(request_ids))
    seeds = jnp.full(samples.shape, seed, jnp.uint32)
    return address_keys(jnp.stack([seeds, ids[:, 0], ids[:, 1], samples], axis=-1), round_)


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


Whole = Callable[[jax.Array], jax.Array]
"""[B, n], its columns cut over devices or not -> the same with every row's columns on one device."""


def invert_cdf(weights: jax.Array, u: jax.Array, whole: Whole = lambda x: x) -> tuple[jax.Array, jax.Array]:
    """The token at which the cumulative weight first exceeds ``u`` times the total; never one of weight 0.

    Args:
        weights: [B, V] float32, not negative, a positive one in each row.
        u: [B] float32 in [0, 1).
        whole: for the few numbers of either level, so that what follows is no talk between devices.

    Returns:
        [B] int32; and the total [B] float32.
    """
    chex.assert_rank([weights, u], [2, 1])
    vocab = weights.shape[-1]
    size = next((size for size in BLOCKS if vocab % size == 0), min(vocab, BLOCKS[0]))
    blocks = -(-vocab // size)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * size - vocab))) if vocab % size else weights
    weights = weights.reshape(weights.shape[0], blocks, size)
    sums = whole(weights.sum(-1))  # [B, blocks]
    total = sums.sum(-1)
    target = u * total
    block = _first_beyond(sums, target)
    before = jnp.where(jnp.arange(blocks) < block[:, None], sums, 0.0).sum(-1)
    inside = whole(jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0])
    token = block * size + _first_beyond(inside, target - before)
    return jnp.minimum(token, vocab - 1).astype(jnp.int32), total  # weights that are no numbers point anywhere


def _first_beyond(weights: jax.Array, target: jax.Array) -> jax.Array:
    """[B, n], [B] -> [B]: first positive weight whose running sum exceeds the target, else the last positive one."""
    positive = weights > 0
    beyond = positive & (jnp.cumsum(weights, -1) > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What a draw may look back at; the tokens only where a penalty asks for them.

    Attributes:
        length: [B] int32, tokens the completion has.
        tokens: [B, C] int32, the completion; what follows ``length`` is ignored.
        prompt: [B, P] int32.
        prompt_len: [B] int32.
    """

    length: jax.Array
    tokens: jax.Array
    prompt: jax.Array
    prompt_len: jax.Array


def sample(
    logits: jax.Array,
    u: jax.Array,
    rules: Sampling,
    temperature: jax.Array | float,
    history: History | None = None,
    whole: Whole = lambda x: x,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Draw one token a row.

    Args:
        logits: [B, V] float32.
        u: [B] float32 in [0, 1); not used when the temperature is 0.
        rules: static; its own temperature is not read.
        temperature: scalar; 0 takes the most likely token that may be drawn.
        history: needed where ``rules`` has penalties or ``min_tokens``.
        whole: see ``invert_cdf``.

    Returns:
        [B] int32 tokens; [B] float32 log-probabilities in the tempered distribution before penalties and truncation;
        and in the one that was drawn from, or None where the rules change nothing. At temperature 0 the first is at
        temperature 1, and the second is 0: that token was certain.
    """
    chex.assert_rank([logits, u], [2, 1])
    temperature = jnp.asarray(temperature, jnp.float32)
    greedy = temperature == 0
    divisor = jnp.where(greedy, 1.0, temperature)
    tempered = _below_top(logits) / divisor
    allowed = _below_top(penalize(logits, rules, history)) / divisor if rules.changed else tempered
    kept = truncate(jnp.exp(allowed), rules.top_k, rules.top_p, rules.min_p)
    token, total = invert_cdf(kept, u, whole)
    token = jax.lax.cond(greedy, lambda: jnp.argmax(allowed, axis=-1).astype(jnp.int32), lambda: token)
    if not rules.changed:
        return token, _logp(tempered, total, token), None
    logp = _logp(tempered, jnp.exp(tempered).sum(-1), token)
    return token, logp, jnp.where(greedy, 0.0, _logp(allowed, total, token))


def _below_top(logits: jax.Array) -> jax.Array:
    """Before a small temperature makes them so large that float32 no longer tells them apart."""
    return logits - logits.max(-1, keepdims=True)


def _logp(scores: jax.Array, total: jax.Array, token: jax.Array) -> jax.Array:
    """[B, V] scores, the total [B] of their exponentials and [B] tokens -> [B]."""
    return jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0] - jnp.log(total)
