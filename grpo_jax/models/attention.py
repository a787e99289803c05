"""Attention: projections, masks, and the softmax of training rows and prompts."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.layers import Compute, Linear, RMSNorm, parts_of
from grpo_jax.models.rotary import Rotation, rotate
from grpo_jax.models.spec import LayerSpec
from grpo_jax.types import Shared

MASKED = -1e30
"""Score of a masked column: finite, so that a row without any valid column stays finite with its gradient."""

SPAN, SPANS = 128, 8
"""Of the queries of a row so many go together, and in so many parts at most: fewer multiply in vain what lies
above the diagonal, more make small products (512 columns on a CPU: 115 ms in one part, 57 in four, 62 in eight)."""

Read = Callable[[jax.Array, jax.Array, jax.Array, int | None, float | None], jax.Array]
"""(q, k, v, window, soft-cap) of training rows -> what the queries read."""


class Attention(nnx.Module):
    """Grouped-query attention's weights. ``fused`` holds q, k and v as one weight by key head, in p parts as an MLP."""

    def __init__(self, compute: Compute, layer: LayerSpec, fused: bool):
        """Weights are [H, d, D], [K, d, D] twice and [D, H, d]; fused [p, K / p (H / K + 2) d, D] and [D, H, d]."""
        self.compute, self.fused = compute, fused
        self.kv_heads, self.group, self.head_dim = layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim
        self.query_scale = layer.query_scale
        into, d = {"embed": layer.width}, {"head_dim": layer.head_dim}
        if fused:
            parts = parts_of(compute, layer.kv_heads)
            rest = layer.kv_heads // parts * (self.group + 2) * layer.head_dim
            self.qkv = Linear(compute, {"kv_heads": parts, ":qkv": rest}, into, layer.qkv_bias)
        else:
            self.q = Linear(compute, {"heads": layer.heads} | d, into, layer.qkv_bias, layer.adapter("q"))
            self.k = Linear(compute, {"kv_heads": layer.kv_heads} | d, into, layer.qkv_bias, layer.adapter("k"))
            self.v = Linear(compute, {"kv_heads": layer.kv_heads} | d, into, layer.qkv_bias, layer.adapter("v"))
        # Of one head, or of all together: q's are [K, H / K, d], k's [K, d].
        q_axes, k_axes = ((), ()) if layer.qk_norm == "head" else ((self.kv_heads, self.group), (self.kv_heads,))
        self.q_norm, self.k_norm = _norm(compute, layer, q_axes), _norm(compute, layer, k_axes)
        self.out = Linear(compute, into, {"heads": layer.heads} | d, layer.out_bias, layer.adapter("out"))

    def project(self, x: jax.Array, turn: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., D] -> q [..., K, H / K, d], k and v [..., K, d]; q and k normed and turned, q scaled."""
        if self.fused:
            qkv = self.qkv(x).reshape(*x.shape[:-1], self.kv_heads, self.group + 2, self.head_dim)
            q, k, v = qkv[..., : self.group, :], qkv[..., self.group, :], qkv[..., self.group + 1, :]
        else:
            q = self.q(x).reshape(*x.shape[:-1], self.kv_heads, self.group, self.head_dim)
            k, v = self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        dtype = self.compute.dtype
        return rotate(q, turn, self.query_scale).astype(dtype), rotate(k, turn).astype(dtype), v

    def merge(self, mixed: jax.Array) -> jax.Array:
        """[..., K, H / K, d] -> [..., D]."""
        return self.out(mixed.reshape(*mixed.shape[:-3], self.kv_heads * self.group, self.head_dim))


def _norm(compute: Compute, layer: LayerSpec, axes: tuple[int, ...]) -> RMSNorm | None:
    if layer.qk_norm == "none":
        return None
    return RMSNorm(compute, (*axes, layer.head_dim), layer.norm_eps, layer.norm_offset)


def fuse_attention(compute: Compute, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an ``Attention`` -> those of the same ``Attention`` with ``fused``."""

    def join(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads = jnp.concatenate([q.reshape(k.shape[0], -1, *k.shape[1:]), k[:, None], v[:, None]], axis=1)
        return heads.reshape(parts_of(compute, k.shape[0]), -1, *k.shape[2:])

    joined = {name: join(*(params[p][name] for p in ("q", "k", "v"))) for name in params["q"]}
    return {"qkv": joined} | {name: value for name, value in params.items() if name not in ("q", "k", "v")}


def segment_mask(segment_ids: jax.Array, context_ids: jax.Array | None, first: int = 0) -> jax.Array:
    """[N, T] twice -> bool [N, T - first, T]: query t, of the columns from ``first`` on, sees column s.

    s is not after t, is not padding, and is of t's segment or of the segment t has as its context.
    """
    keys, columns = segment_ids[:, None, :], jnp.arange(segment_ids.shape[1])
    seen = keys == segment_ids[:, first:, None]
    if context_ids is not None:
        seen |= keys == context_ids[:, first:, None]
    return seen & (keys != 0) & (columns[None, :] <= columns[first:, None])


def window_mask(mask: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """bool [N, Q, T] and positions [N, T] -> the mask without what is ``window`` positions back or more.

    Its queries are the last Q columns. Positions, not columns, decide: a completion's tokens may lie far from the
    prompt they share with others.
    """
    if window is None:
        return mask
    queries = positions[:, positions.shape[1] - mask.shape[1] :, None]
    return mask & (queries - positions[:, None, :] < window)


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    """``softcap * tanh(scores / softcap)`` (Gemma 2), or the scores."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    compute: Compute, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None
) -> jax.Array:
    """q [N, T, K, g, d] over k, v [N, S, K, d] where mask [N, T, S] -> [N, T, K, g, d].

    The queries are of the last T columns, and none sees a column after its own.
    """
    # Heads go first once: else each product's scores are copied into another order, which takes a fifth of the time.
    q, k, v = (jnp.moveaxis(x, 1, -2) for x in (q, k, v))
    (queries, columns), parts = mask.shape[1:], []
    size = -(-queries // min(SPANS, -(-queries // SPAN)))
    for start in range(0, queries, size):
        here, end = slice(start, start + size), columns - queries + min(start + size, queries)
        parts.append(_mix(compute, q[..., here, :], k[..., :end, :], v[..., :end, :], mask[:, here, :end], softcap))
    return jnp.moveaxis(jnp.concatenate(parts, axis=-2), -2, 1)


def _mix(
    compute: Compute, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None
) -> jax.Array:
    """The softmax of one part, heads first; divided by its sum where the numbers are few, after the values."""
    scores = cap(compute.einsum("nkgtd,nksd->nkgts", q, k, out=jnp.float32), softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = compute.einsum("nkgts,nksd->nkgtd", weights.astype(compute.dtype), v, out=jnp.float32)
    return (mixed / weights.sum(axis=-1)[..., None]).astype(compute.dtype)


def row_reader(
    compute: Compute,
    windows: Iterable[int | None],
    positions: jax.Array,
    segment_ids: jax.Array,
    context_ids: jax.Array | None,
    shared: Shared | None,
) -> Read:
    """How the queries of training rows read keys and values, with one mask for each window.

    Args:
        compute: dtype, precision, mesh.
        windows: of the layers.
        positions, segment_ids, context_ids: [N, T] int32.
        shared: how group rows are cut: B blocks of c columns behind P of the prompt. Then prompt columns meet
            themselves alone and each block the prompt and itself: P + c scores a token and not T, one softmax over
            them as in rows of any other kind.
    """
    if shared is None:
        masks = _masks(windows, positions, segment_ids, context_ids)
        return lambda q, k, v, window, softcap: attend(compute, q, k, v, masks[window], softcap)
    prompt, context = shared.prompt_len, None if context_ids is None else _alone(context_ids, shared)
    before = _masks(windows, positions[:, :prompt], segment_ids[:, :prompt], None)
    behind = _masks(windows, _alone(positions, shared), _alone(segment_ids, shared), context, prompt)

    def read(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, softcap: float | None) -> jax.Array:
        first = attend(compute, q[:, :prompt], k[:, :prompt], v[:, :prompt], before[window], softcap)
        rest = _blocks(q, shared), _alone(k, shared), _alone(v, shared)
        then = attend(compute, *rest, behind[window], softcap)
        return jnp.concatenate([first, then.reshape(q.shape[0], -1, *q.shape[2:])], axis=1)

    return read


def _masks(
    windows: Iterable[int | None],
    positions: jax.Array,
    segment_ids: jax.Array,
    context_ids: jax.Array | None,
    first: int = 0,
) -> dict[int | None, jax.Array]:
    mask = segment_mask(segment_ids, context_ids, first)
    return {window: window_mask(mask, positions, window) for window in dict.fromkeys(windows)}


def _blocks(x: jax.Array, shared: Shared) -> jax.Array:
    """Group rows [N, P + B c, ...] -> their blocks [N B, c, ...]."""
    return x[:, shared.prompt_len :].reshape(-1, shared.block_len, *x.shape[2:])


def _alone(x: jax.Array, shared: Shared) -> jax.Array:
    """Group rows [N, P + B c, ...] -> each block behind the prompt, [N B, P + c, ...]."""
    blocks = _blocks(x, shared)
    shape = (x.shape[0], blocks.shape[0] // x.shape[0], shared.prompt_len, *x.shape[2:])
    prompts = jnp.broadcast_to(x[:, None, : shared.prompt_len], shape)
    return jnp.concatenate([prompts.reshape(-1, *shape[2:]), blocks], axis=1)
