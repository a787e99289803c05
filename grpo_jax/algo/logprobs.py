"""Log-probabilities and entropies from hidden states and the unembedding, without [tokens, V] at once.

The logits of a chunk of the vocabulary (and, for very many tokens, of a chunk of these) are made, folded into a running
log-sum-exp and dropped; the backward pass makes them again and forms both gradients chunk by chunk. Peak memory is that
of one chunk of logits besides the gradients themselves; the price is a fourth matmul beside the naive form's three.

All of it is dense jax that GSPMD partitions. Token chunks are strided over the rows, so rows sharded over `data` stay
where they are. Vocabulary chunks slice the unembedding along V: shard that over D (fsdp), or gather it before; where V
itself is sharded (tensor), pass `vocab_chunk=V` and chunk the tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

from grpo_jax.algo.refusals import refuse

PLAIN_LOGITS = 2**21
"""Up to this many logits the plain form is taken: it is faster, and 8 MiB are no burden."""
CHUNK_FLOATS = 2**22
"""What a default chunk may hold: 16 MiB in float32."""
LANES = 128
"""Default chunks are multiples of this, which tiled matmuls like."""
LEAST_VOCAB_CHUNK = 512
"""Narrower chunks of the vocabulary starve the matmul: with more tokens than fit, these are cut as well."""

_LOWEST = -1e30
"""The running maximum before the first chunk: finite, so that no 0 times infinity arises."""

Carry = TypeVar("Carry")


class Head(NamedTuple):
    """What makes logits out of hidden states; static."""

    temperature: float
    softcap: float | None
    logit_scale: float
    transposed: bool
    precision: jax.lax.PrecisionLike
    vocab_chunk: int
    with_entropy: bool


def logprobs_and_entropy(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
    with_entropy: bool = True,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Array | None]:
    """Return the log-probability of each target and the entropy of its distribution.

    The logits are softcap tanh(logit_scale hidden unembed / softcap) / temperature. Both results have gradients with
    respect to `hidden` and `unembed`.

    Args:
      hidden: [M, D] float; row i scores targets[i].
      unembed: [D, V] float, or with `transposed` [V, D]: an embedding table as it lies, tied weights without a copy.
      targets: [M] int in [0, V).
      temperature: of the distribution, above 0.
      softcap: bound on the magnitude of the logits before the temperature; None: none.
      logit_scale: multiplies the logits before the soft-cap.
      token_chunk: tokens whose logits are alive at once; None: all, or if vocab_chunk is None too, by the shapes.
      vocab_chunk: vocabulary entries whose logits are alive at once; None: all, or if token_chunk is None too, by the
        shapes. Chunks need not divide M or V; chunks that hold all of both are the plain form.
      with_entropy: whether to compute the entropy.
      transposed: whether `unembed` is [V, D].
      precision: of the matmuls, as `jax.lax.dot_general` takes it.

    Returns:
      (logp [M], entropy [M] in nat or None), float32 (float64 for float64 inputs).

    Raises:
      ValueError: a chunk below 1 or a temperature or soft-cap not above 0.
    """
    chex.assert_rank([hidden, unembed, targets], [2, 2, 1])
    chex.assert_equal_shape_prefix([hidden, targets], 1)
    chex.assert_equal(hidden.shape[1], unembed.shape[1 if transposed else 0])
    _check(temperature, softcap, token_chunk, vocab_chunk)
    count, vocab = hidden.shape[0], unembed.shape[0 if transposed else 1]
    tokens, entries = chunk_sizes(count, hidden.shape[1], vocab, token_chunk, vocab_chunk)
    head = Head(temperature, softcap, logit_scale, transposed, precision, entries, with_entropy)
    if tokens >= count and entries >= vocab:
        logp, entropy = _plain(head, hidden, unembed, targets)
    else:
        parts = -(-count // tokens)
        rows = -(-count // parts)
        cut = partial(_cut, parts=parts, rows=rows)
        logp, entropy = (_join(x, count) for x in _chunked(head, cut(hidden), unembed, cut(targets)))
    return logp, entropy if with_entropy else None


def chunk_sizes(
    count: int, width: int, vocab: int, token_chunk: int | None = None, vocab_chunk: int | None = None
) -> tuple[int, int]:
    """Return (tokens, vocabulary entries) of a chunk for [count, width] hidden states, as given or chosen.

    Of tokens and vocabulary the caller's choice of one leaves the other whole. Without any, the vocabulary is cut so
    that the logits of a chunk, its slice of the unembedding and that slice's gradient fit into CHUNK_FLOATS; where
    that makes the slice too narrow for the matmul, the tokens are cut as well.
    """
    if token_chunk is not None or vocab_chunk is not None or count * vocab <= PLAIN_LOGITS:
        return min(token_chunk or count, max(count, 1)), min(vocab_chunk or vocab, vocab)
    fitting = CHUNK_FLOATS // (count + 2 * width) // LANES * LANES
    vocab_chunk = min(max(fitting, LEAST_VOCAB_CHUNK), vocab)
    return min(max(CHUNK_FLOATS // vocab_chunk, LEAST_VOCAB_CHUNK), count), vocab_chunk


def _check(temperature: float, softcap: float | None, token_chunk: int | None, vocab_chunk: int | None) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise refuse(f"{name}={value!r}", "logits are divided by it", f"Choose {name} above 0")
    for name, size in (("token_chunk", token_chunk), ("vocab_chunk", vocab_chunk)):
        if size is not None and size < 1:
            raise refuse(f"{name}={size!r}", "a chunk holds something", f"Choose {name} of at least 1, or None")


def _cut(x: Array, parts: int, rows: int) -> Array:
    """[M, ...] -> [parts, rows, ...], each part strided over the rows and filled up with zeros."""
    padded = jnp.pad(x, [(0, parts * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(rows, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, count: int) -> Array:
    """[parts, rows] -> [M], the inverse of `_cut`."""
    return x.swapaxes(0, 1).reshape(-1)[:count]


def _raw_logits(head: Head, hidden: Array, unembed: Array) -> Array:
    """[m, D] and [D, c] (or [c, D]) -> hidden times unembed, [m, c] float32."""
    contract = (((1,), (1 if head.transposed else 0,)), ((), ()))
    result = jnp.promote_types(jnp.result_type(hidden, unembed), jnp.float32)
    return jax.lax.dot_general(hidden, unembed, contract, precision=head.precision, preferred_element_type=result)


def _logits(head: Head, hidden: Array, unembed: Array) -> Array:
    """Return the logits of the tempered distribution, [m, c] float32."""
    logits = _raw_logits(head, hidden, unembed)
    if head.softcap is None:
        scale = head.logit_scale / head.temperature
        return logits if scale == 1 else logits * scale
    return jnp.tanh(logits * (head.logit_scale / head.softcap)) * (head.softcap / head.temperature)


def _slope(head: Head, logits: Array) -> Array | float:
    """Return d logits / d (hidden times unembed), from the logits themselves."""
    scale = head.logit_scale / head.temperature
    if head.softcap is None:
        return scale
    return scale * (1 - jnp.square(logits * (head.temperature / head.softcap)))


def _plain(head: Head, hidden: Array, unembed: Array, targets: Array) -> tuple[Array, Array]:
    """All logits at once; JAX differentiates it."""
    logits = _logits(head, hidden, unembed)
    logps = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(logps, targets[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1) if head.with_entropy else jnp.zeros_like(logp)
    return logp, entropy


class Fold(NamedTuple):
    """Running sums over the vocabulary, each [m]: e = exp(logit - high)."""

    high: Array
    mass: Array  # sum of e
    moment: Array  # sum of e (logit - high)
    target: Array  # the target's logit


def _over_vocabulary(
    head: Head, unembed: Array, body: Callable[[Array | int, Array, Carry], Carry], carry: Carry
) -> Carry:
    """Fold `body(start, chunk of unembed, carry)` over the vocabulary's chunks, the last of which may be shorter."""
    axis = 0 if head.transposed else 1
    vocab, size = unembed.shape[axis], head.vocab_chunk

    def step(start: Array | int, width: int, carry: Carry) -> Carry:
        return body(start, jax.lax.dynamic_slice_in_dim(unembed, start, width, axis), carry)

    carry = jax.lax.fori_loop(0, vocab // size, lambda i, carry: step(i * size, size, carry), carry)
    return step(vocab - vocab % size, vocab % size, carry) if vocab % size else carry


def _fold(head: Head, hidden: Array, chunk: Array, index: Array, fold: Fold) -> Fold:
    """Take the logits of one chunk in; index [m] is the target's place in it, outside [0, c) if it lies elsewhere."""
    logits = _logits(head, hidden, chunk)
    high = jnp.maximum(fold.high, jnp.max(logits, axis=-1))
    shrink = jnp.exp(fold.high - high)
    above = logits - high[:, None]
    mass = jnp.exp(above)
    moment = fold.moment
    if head.with_entropy:
        moment = shrink * (moment + fold.mass * (fold.high - high)) + jnp.sum(mass * above, axis=-1)
    at = jnp.clip(index, 0, logits.shape[1] - 1)
    found = jnp.take_along_axis(logits, at[:, None], axis=-1)[:, 0]
    target = jnp.where(at == index, found, fold.target)
    return Fold(high, shrink * fold.mass + jnp.sum(mass, axis=-1), moment, target)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: Head, hidden: Array, unembed: Array, targets: Array) -> tuple[Array, Array]:
    """Hidden [parts, rows, D] and targets [parts, rows] -> (logp, entropy), each [parts, rows]."""
    return _chunked_forward(head, hidden, unembed, targets)[0]


def _chunked_forward(
    head: Head, hidden: Array, unembed: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    dtype = jnp.promote_types(jnp.result_type(hidden, unembed), jnp.float32)
    zeros = jnp.zeros(targets.shape, dtype)

    def body(start: Array | int, chunk: Array, folds: Fold) -> Fold:
        return jax.lax.map(lambda part: _fold(head, part[0], chunk, part[1] - start, part[2]), (hidden, targets, folds))

    fold = _over_vocabulary(head, unembed, body, Fold(zeros + _LOWEST, zeros, zeros, zeros))
    log_mass = jnp.log(fold.mass)
    logp = fold.target - fold.high - log_mass
    entropy = log_mass - fold.moment / fold.mass if head.with_entropy else zeros
    return (logp, entropy), (hidden, unembed, targets, fold.high + log_mass, entropy)


def _chunked_backward(
    head: Head, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, unembed, targets, log_total, entropy = saved
    axis = 0 if head.transposed else 1
    by_logp, by_entropy = cotangents

    def part_of(chunk: Array, start: Array | int, d_chunk: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        """Return the gradient of one part's hidden states from one chunk, and the chunk's own with the part added."""
        x, target, total, h, g, e, d_x = part
        logits = _logits(head, x, chunk)
        logps = logits - total[:, None]
        hit = target[:, None] - start == jnp.arange(logits.shape[1])
        inner = g[:, None] + e[:, None] * (logps + h[:, None]) if head.with_entropy else g[:, None]
        d_logits = (jnp.where(hit, g[:, None], 0) - jnp.exp(logps) * inner) * _slope(head, logits)
        d_logits = d_logits.astype(jnp.result_type(x, chunk))
        dot = partial(jax.lax.dot_general, precision=head.precision, preferred_element_type=log_total.dtype)
        d_x = d_x + dot(d_logits, chunk, (((1,), (axis,)), ((), ())))
        left, right = (d_logits, x) if head.transposed else (x, d_logits)
        return d_chunk + dot(left, right, (((0,), (0,)), ((), ()))), d_x

    def body(start: Array | int, chunk: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_unembed = carry
        parts = (hidden, targets, log_total, entropy, by_logp, by_entropy, d_hidden)
        d_chunk, d_hidden = jax.lax.scan(
            lambda d_chunk, part: part_of(chunk, start, d_chunk, part), jnp.zeros(chunk.shape, log_total.dtype), parts
        )
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembed, d_chunk.astype(unembed.dtype), start, axis)

    start = (jnp.zeros(hidden.shape, log_total.dtype), jnp.zeros_like(unembed))
    d_hidden, d_unembed = _over_vocabulary(head, unembed, body, start)
    return d_hidden.astype(hidden.dtype), d_unembed, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
