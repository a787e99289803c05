"""Attention: projections, masks, and the softmax of training rows and prompts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.layers import Compute, Linear, RMSNorm
from grpo_jax.models.rotary import Rotation, rotate
from grpo_jax.models.spec import LayerSpec

MASKED = -1e30
"""Score of a masked column: finite, so that a row without any valid column stays finite with its gradient."""


class Attention(nnx.Module):
    """Grouped-query attention's weights. ``fused`` holds q, k and v as one weight by key head."""

    def __init__(self, compute: Compute, layer: LayerSpec, fused: bool):
        """Weights are [H, d, D], [K, d, D] twice and [D, H, d]; fused [K, H / K + 2, d, D] and [D, H, d]."""
        self.compute, self.fused = compute, fused
        self.kv_heads, self.group, self.head_dim = layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim
        self.query_scale = layer.query_scale
        into, d = {"embed": layer.width}, {"head_dim": layer.head_dim}
        if fused:
            out = {"kv_heads": layer.kv_heads, ":qkv": self.group + 2} | d
            self.qkv = Linear(compute, out, into, layer.qkv_bias)
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
            qkv = self.qkv(x)
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


def fuse_attention(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an ``Attention`` -> those of the same ``Attention`` with ``fused``."""

    def join(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.concatenate([q.reshape(k.shape[0], -1, *k.shape[1:]), k[:, None], v[:, None]], axis=1)

    joined = {name: join(*(params[p][name] for p in ("q", "k", "v"))) for name in params["q"]}
    return {"qkv": joined} | {name: value for name, value in params.items() if name not in ("q", "k", "v")}


def segment_mask(segment_ids: jax.Array, context_ids: jax.Array | None) -> jax.Array:
    """[N, T] twice -> bool [N, T, T]: query t sees column s.

    s is not after t, is not padding, and is of t's segment or of the segment t has as its context.
    """
    keys, columns = segment_ids[:, None, :], jnp.arange(segment_ids.shape[1])
    seen = keys == segment_ids[:, :, None]
    if context_ids is not None:
        seen |= keys == context_ids[:, :, None]
    return seen & (keys != 0) & (columns[None, :] <= columns[:, None])


def window_mask(mask: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """bool [N, T, T] and positions [N, T] -> the mask without what is ``window`` positions back or more.

    Positions, not columns, decide: a completion's tokens may lie far from the prompt they share with others.
    """
    return mask if window is None else mask & (positions[:, :, None] - positions[:, None, :] < window)


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
    """``softcap * tanh(scores / softcap)`` (Gemma 2), or the scores."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    compute: Compute, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None
) -> jax.Array:
    """q [N, T, K, g, d] over k, v [N, S, K, d] where mask [N, T, S] -> [N, T, K, g, d]."""
    scores = cap(compute.einsum("ntkgd,nskd->nkgts", q, k, out=jnp.float32), softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    return compute.einsum("nkgts,nskd->ntkgd", weights.astype(compute.dtype), v)
