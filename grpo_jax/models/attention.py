"""Attention: projections, rotary positions, masks, and the softmax over one or two key buffers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from grpo_jax.models.layers import Compute, Linear
from grpo_jax.models.spec import LayerSpec, RotarySpec

MASKED = -1e30
"""Score of a masked column: finite, so that a row without any valid column stays finite with its gradient."""

Rotation = tuple[jax.Array, jax.Array]
"""cos and sin, each [..., d / 2] float32."""


class Attention(nnx.Module):
    """Grouped-query attention's weights. ``fused`` holds q, k and v as one weight by key head."""

    def __init__(self, compute: Compute, layer: LayerSpec, fused: bool):
        """Weights are [H, d, D], [K, d, D] twice and [D, H, d]; fused [K, H / K + 2, d, D] and [D, H, d]."""
        self.compute, self.fused = compute, fused
        self.kv_heads, self.group, self.head_dim = layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim
        into, d = {"embed": layer.width}, {"head_dim": layer.head_dim}
        if fused:
            out = {"kv_heads": layer.kv_heads, ":qkv": self.group + 2} | d
            self.qkv = Linear(compute, out, into, layer.qkv_bias)
        else:
            self.q = Linear(compute, {"heads": layer.heads} | d, into, layer.qkv_bias)
            self.k = Linear(compute, {"kv_heads": layer.kv_heads} | d, into, layer.qkv_bias)
            self.v = Linear(compute, {"kv_heads": layer.kv_heads} | d, into, layer.qkv_bias)
        self.out = Linear(compute, {"embed": layer.width}, {"heads": layer.heads} | d, layer.out_bias)

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., D] -> q [..., K, H / K, d] rotated and scaled by d^-1/2, k [..., K, d] rotated, v [..., K, d]."""
        if self.fused:
            qkv = self.qkv(x)
            q, k, v = qkv[..., : self.group, :], qkv[..., self.group, :], qkv[..., self.group + 1, :]
        else:
            q = self.q(x).reshape(*x.shape[:-1], self.kv_heads, self.group, self.head_dim)
            k, v = self.k(x), self.v(x)
        dtype = self.compute.dtype
        return rotate(q, rotation, self.head_dim**-0.5).astype(dtype), rotate(k, rotation).astype(dtype), v

    def merge(self, mixed: jax.Array) -> jax.Array:
        """[..., K, H / K, d] -> [..., D]."""
        return self.out(mixed.reshape(*mixed.shape[:-3], self.kv_heads * self.group, self.head_dim))


def fuse_attention(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an ``Attention`` -> those of the same ``Attention`` with ``fused``."""

    def join(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.concatenate([q.reshape(k.shape[0], -1, *k.shape[1:]), k[:, None], v[:, None]], axis=1)

    names = params["q"]
    return {"qkv": {n: join(params["q"][n], params["k"][n], params["v"][n]) for n in names}, "out": params["out"]}


def inverse_frequencies(rotary: RotarySpec, head_dim: int) -> np.ndarray:
    """[d / 2] float32, in float32 arithmetic as the models were trained (Su et al. 2021; llama3: Meta 2024)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / (np.float32(rotary.theta) ** exponent)
    if rotary.kind == "default":
        return plain
    turns = np.float32(rotary.original_len) * plain / np.float32(2 * math.pi)
    low, high = np.float32(rotary.low_freq_factor), np.float32(rotary.high_freq_factor)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (share * plain + (1 - share) * plain / np.float32(rotary.factor)).astype(np.float32)


def rotation(rotary: RotarySpec, head_dim: int, positions: jax.Array) -> Rotation:
    """[...] int32 -> cos, sin [..., d / 2]."""
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(rotary, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, turn: Rotation, scale: float = 1.0) -> jax.Array:
    """[..., heads axes, d] -> the same, float32: the first half of the features is paired with the second."""
    shape = turn[0].shape[:-1] + (1,) * (x.ndim - turn[0].ndim) + turn[0].shape[-1:]
    cos, sin = (part.reshape(shape) * scale for part in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def segment_mask(segment_ids: jax.Array, context_ids: jax.Array | None) -> jax.Array:
    """[N, T] twice -> bool [N, T, T]: query t sees column s.

    s is not after t, is not padding, and is of t's segment or of the segment t has as its context.
    """
    keys, columns = segment_ids[:, None, :], jnp.arange(segment_ids.shape[1])
    seen = keys == segment_ids[:, :, None]
    if context_ids is not None:
        seen |= keys == context_ids[:, :, None]
    return seen & (keys != 0) & (columns[None, :] <= columns[:, None])


def attend(compute: Compute, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [N, T, K, g, d] over k, v [N, S, K, d] where mask [N, T, S] -> [N, T, K, g, d]."""
    scores = compute.einsum("ntkgd,nskd->nkgts", q, k, out=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    return compute.einsum("nkgts,nskd->ntkgd", weights.astype(compute.dtype), v)


def attend_cached(
    compute: Compute,
    q: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    prompt_mask: jax.Array,
    own: tuple[jax.Array, jax.Array],
    own_mask: jax.Array,
) -> jax.Array:
    """One query a row over its prompt's keys, which its group shares, and its own: one softmax over both.

    Args:
        compute: dtype, precision, mesh.
        q: [B, K, g, d], B = Q * G.
        prompt: k and v, each [Q, K, P, d].
        prompt_mask: bool [Q, P].
        own: k and v, each [B, K, C, d].
        own_mask: bool [B, C], True somewhere in each row.

    Returns:
        [B, K, g, d].
    """
    rows, prompts = q.shape[0], prompt[0].shape[0]
    grouped = q.reshape(prompts, rows // prompts, *q.shape[1:])
    far = compute.einsum("qnkgd,qkpd->qkngp", grouped, prompt[0], out=jnp.float32)
    far = jnp.where(prompt_mask[:, None, None, None], far, MASKED)
    near = compute.einsum("bkgd,bkcd->bkgc", q, own[0], out=jnp.float32)
    near = jnp.where(own_mask[:, None, None], near, MASKED)

    def to_rows(x: jax.Array) -> jax.Array:  # [Q, K, G, g, ...] -> [B, K, g, ...]
        return jnp.swapaxes(x, 1, 2).reshape(rows, *q.shape[1:3], *x.shape[4:])

    top = jnp.maximum(to_rows(far.max(axis=-1)), near.max(axis=-1))  # [B, K, g]
    far_top = jnp.swapaxes(top.reshape(grouped.shape[:-1]), 1, 2)  # [Q, K, G, g]
    far, near = jnp.exp(far - far_top[..., None]), jnp.exp(near - top[..., None])
    total = to_rows(far.sum(axis=-1)) + near.sum(axis=-1)
    mixed = to_rows(compute.einsum("qkngp,qkpd->qkngd", far.astype(compute.dtype), prompt[1], out=jnp.float32))
    mixed += compute.einsum("bkgc,bkcd->bkgd", near.astype(compute.dtype), own[1], out=jnp.float32)
    return (mixed / total[..., None]).astype(compute.dtype)


def write_column(buffer: jax.Array, new: jax.Array, column: jax.Array) -> jax.Array:
    """Puts ``new`` [B, K, d] at column ``column`` [B] of ``buffer`` [B, K, C, d]; columns from C on are dropped."""
    return jax.vmap(lambda row, value, at: row.at[:, at].set(value, mode="drop"))(buffer, new, column)
