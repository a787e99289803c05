"""Prompts through the model: all columns at once, or of long prompts some at a time over the cache of those before."""

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.attention import MASKED, attend, cap, segment_mask, window_mask
from grpo_jax.models.layers import Compute
from grpo_jax.models.spec import LayerSpec
from grpo_jax.models.transformer import Layout, Mix, View, unrolled

CHUNK = 1024
"""Columns that go through the model at once. Of P columns the scores are [Q, H, CHUNK, CHUNK], never [Q, H, P, P]."""

Buffers = tuple[tuple[jax.Array, jax.Array], ...]
"""For each layer k and v, each [Q, K, P, d]."""


def prefill(
    layout: Layout, view: View, tokens: jax.Array, prompt_len: jax.Array, chunk: int = CHUNK
) -> tuple[jax.Array, Buffers]:
    """Prompts [Q, P] -> the hidden state of each one's last token [Q, D], and keys and values.

    Args:
        layout: of the model.
        view: its parameters.
        tokens: [Q, P] int32.
        prompt_len: [Q] int32, at least 1. What the cache holds from there on means nothing.
        chunk: most columns at once.
    """
    outer = nnx.merge(layout.outer, view.outer)
    if tokens.shape[1] <= chunk:
        x, cache = _whole(layout, view, outer.embed(tokens), prompt_len)
        return outer.norm(_last(x, prompt_len)), cache
    return _in_chunks(layout, view, tokens, prompt_len, chunk)


def _whole(layout: Layout, view: View, x: jax.Array, prompt_len: jax.Array) -> tuple[jax.Array, Buffers]:
    compute, width = layout.compute, x.shape[1]
    positions = jnp.arange(width, dtype=jnp.int32)[None]
    mask = segment_mask((positions < prompt_len[:, None]).astype(jnp.int32), None)
    masks = {window: window_mask(mask, positions, window) for window in {layer.window for layer in layout.layers}}

    def mix_in(index: int) -> Mix:
        layer = layout.layers[index]

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            mixed = attend(compute, q, k, v, masks[layer.window], layer.softcap)
            return mixed, (_to_cache(compute, k), _to_cache(compute, v))

        return mix

    x = compute.shard(x, "batch", None, None)
    return unrolled(layout, view, x, layout.turns(positions, width), mix_in)


def _in_chunks(
    layout: Layout, view: View, tokens: jax.Array, prompt_len: jax.Array, chunk: int
) -> tuple[jax.Array, Buffers]:
    """Parts of one size; the last begins early enough to end with the prompts, what it does twice is the same."""
    compute, (rows, width) = layout.compute, tokens.shape
    size = -(-width // -(-width // chunk))
    outer = nnx.merge(layout.outer, view.outer)

    def part(index: jax.Array, carry: tuple[jax.Array, Buffers]) -> tuple[jax.Array, Buffers]:
        last, cache = carry
        start = jnp.minimum(index * size, width - size)

        def mix_in(place: int) -> Mix:
            def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                new = zip(cache[place], (k, v), strict=True)
                keys, values = (
                    jax.lax.dynamic_update_slice_in_dim(old, _to_cache(compute, x), start, axis=2) for old, x in new
                )
                return attend_before(compute, q, keys, values, start, layout.layers[place]), (keys, values)

            return mix

        some = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        turns = layout.turns(start + jnp.arange(size, dtype=jnp.int32)[None], width)
        x, cache = unrolled(layout, view, compute.shard(outer.embed(some), "batch", None, None), turns, mix_in)
        inside = prompt_len - start
        here = ((inside >= 1) & (inside <= size))[:, None]
        return jnp.where(here, _last(x, jnp.clip(inside, 1, size)), last), cache

    def empty(layer: LayerSpec) -> jax.Array:
        zeros = jnp.zeros((rows, layer.kv_heads, width, layer.head_dim), compute.dtype)
        return compute.shard(zeros, "batch", "kv_heads", None, None)

    nothing = tuple((empty(layer), empty(layer)) for layer in layout.layers)
    none = jnp.zeros((rows, layout.layers[0].width), compute.dtype)
    parts = -(-prompt_len.max() // size)
    last, cache = jax.lax.fori_loop(0, parts, part, (none, nothing))
    return outer.norm(last), cache


def attend_before(
    compute: Compute, q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array, layer: LayerSpec
) -> jax.Array:
    """Queries at the columns from ``start`` on over what a cache holds up to each: an online softmax, block by block.

    Only blocks that some query sees are read (Milakov and Gimelshein 2018; Dao et al. 2022).

    Args:
        compute: dtype, precision, mesh.
        q: [Q, T, K, g, d], columns start to start + T.
        keys: [Q, K, P, d], their own among them.
        values: the same.
        start: scalar int32, at most P - T.
        layer: for its window and soft-cap.

    Returns:
        [Q, T, K, g, d].
    """
    size, width = q.shape[1], keys.shape[2]
    rows = start + jnp.arange(size, dtype=jnp.int32)[:, None]

    def block(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        mixed, total, top = carry
        begin = jnp.minimum(index * size, width - size)
        k, v = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2) for x in (keys, values))
        columns = begin + jnp.arange(size, dtype=jnp.int32)[None]
        seen = (columns <= rows) & (columns >= index * size)  # the last block begins early
        if layer.window is not None:
            seen &= rows - columns < layer.window
        scores = cap(compute.einsum("qtkgd,qksd->qkgts", q, k, out=jnp.float32), layer.softcap)
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, scores.max(axis=-1))
        weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        more = compute.einsum("qkgts,qksd->qkgtd", weights.astype(compute.dtype), v, out=jnp.float32)
        return mixed * shrink[..., None] + more, total * shrink + weights.sum(axis=-1), higher

    first = 0 if layer.window is None else jnp.maximum(0, start - layer.window + 1) // size
    shape = (q.shape[0], *q.shape[2:4], size)
    zeros = compute.shard(jnp.zeros((*shape, q.shape[-1]), jnp.float32), "batch", "kv_heads", None, None, None)
    total = compute.shard(jnp.zeros(shape, jnp.float32), "batch", "kv_heads", None, None)
    blocks = (start + size - 1) // size + 1
    mixed, total, _ = jax.lax.fori_loop(first, blocks, block, (zeros, total, jnp.full_like(total, MASKED)))
    return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(compute.dtype)


def _last(x: jax.Array, length: jax.Array) -> jax.Array:
    """[Q, T, D] and [Q] -> [Q, D] at column length - 1."""
    return jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]


def _to_cache(compute: Compute, x: jax.Array) -> jax.Array:
    """[Q, P, K, d] -> [Q, K, P, d], rows over data and fsdp, heads over tensor."""
    return compute.shard(jnp.swapaxes(x, 1, 2), "batch", "kv_heads", None, None)
