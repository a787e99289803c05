"""Attention of decoding as a Pallas kernel for GPUs, through Triton: the columns are split over programs.

Few rows with long caches do not fill a GPU when a row is one program's work, so each takes a part of the columns, and
the parts are joined afterwards (Dao et al. 2023, Flash-Decoding). A program reads those of its columns that one of its
queries sees. Run in interpret mode only, on a CPU: untested on hardware.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

MASKED = -1e30
COLUMNS = 64
"""Read at once; a power of two, as every size inside a program."""
LEAST_QUERIES = 16
"""Rows of the smallest product that tensor cores have."""
MOST_QUERIES = 64
"""Queries of one program: more have their columns read again."""
PROGRAMS = 264
"""Enough for a large GPU: two for each of 132 processors."""


def read_split(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    first: jax.Array,
    stop: jax.Array,
    softcap: float | None,
    precision: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax over the columns that queries see.

    Args:
        q: [R, K, M, d].
        keys: [R, K, d, C], in q's dtype, or a narrower one that is cast to it.
        values: [R, K, C, d], likewise.
        scales: factors of the keys and of the values, each [R, K, C] float32, or None.
        first, stop: [R, M] int32, a query sees ``first <= column < stop``; it may see none.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None leaves them.
        precision: of the products.
        interpret: run by the interpreter, on any backend.

    Returns:
        Largest score [R, K, M], sum of ``exp(score - largest)`` [R, K, M], values so weighted [R, K, M, d]; float32.
    """
    rows, kv_heads, count, head_dim = q.shape
    tile = min(MOST_QUERIES, max(LEAST_QUERIES, pl.next_power_of_2(count)))
    tiles, wide = math.ceil(count / tile), pl.next_power_of_2(max(head_dim, LEAST_QUERIES))
    part, splits = _split(values.shape[2], rows * kv_heads * tiles)
    more = tiles * tile - count
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, wide - head_dim)))
    first, stop = (jnp.pad(x, ((0, 0), (0, more))) for x in (first, stop))

    cut_keys = pl.BlockSpec((None, None, wide, part), lambda r, k, m, s: (r, k, 0, s))
    cut = pl.BlockSpec((None, None, part, wide), lambda r, k, m, s: (r, k, s, 0))
    scale = pl.BlockSpec((None, None, part), lambda r, k, m, s: (r, k, s))
    bound = pl.BlockSpec((None, tile), lambda r, k, m, s: (r, m))
    one = pl.BlockSpec((None, None, None, tile), lambda r, k, m, s: (r, k, s, m))
    sizes = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = partial(
        _kernel, length=values.shape[2], head_dim=head_dim, part=part, softcap=softcap, precision=precision
    )
    top, total, mixed = pl.pallas_call(
        kernel,
        grid=(rows, kv_heads, tiles, splits),
        in_specs=[
            pl.BlockSpec((None, None, tile, wide), lambda r, k, m, s: (r, k, m, 0)),
            *(bound, bound, cut_keys, cut),
            *([] if scales is None else [scale, scale]),
        ],
        out_specs=[one, one, pl.BlockSpec((None, None, None, tile, wide), lambda r, k, m, s: (r, k, s, m, 0))],
        out_shape=[
            sizes((rows, kv_heads, splits, tiles * tile)),
            sizes((rows, kv_heads, splits, tiles * tile)),
            sizes((rows, kv_heads, splits, tiles * tile, wide)),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(q, first, stop, keys, values, *(scales or ()))
    return _join(top[..., :count], total[..., :count], mixed[..., :count, :head_dim])


def _split(length: int, programs: int) -> tuple[int, int]:
    """Columns of a part, a multiple of ``COLUMNS``, and parts, so that there are enough programs and none is tiny."""
    blocks = math.ceil(length / COLUMNS)
    splits = max(1, min(math.ceil(PROGRAMS / programs), blocks // 2))
    part = math.ceil(blocks / splits) * COLUMNS
    return part, math.ceil(length / part)


def _join(top: jax.Array, total: jax.Array, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parts [R, K, S, ...] to one."""
    highest = top.max(axis=2)
    kept = jnp.exp(top - highest[:, :, None])
    return highest, (total * kept).sum(axis=2), (mixed * kept[..., None]).sum(axis=2)


def _kernel(*refs: Any, length: int, head_dim: int, part: int, softcap: float | None, precision: str) -> None:
    q_ref, first_ref, stop_ref, k_ref, v_ref, *scale_refs, top_ref, total_ref, mixed_ref = refs
    q, first, stop = q_ref[...], first_ref[...], stop_ref[...]
    start = pl.program_id(3) * part
    real = jnp.arange(q.shape[1]) < head_dim
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def read(ref: Any, index: tuple[Any, ...], mask: jax.Array) -> jax.Array:
        return plgpu.load(ref.at[index], mask=mask, other=0)

    def body(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        at = index * COLUMNS
        here, columns = pl.ds(at, COLUMNS), start + at + jnp.arange(COLUMNS)
        there = columns < length  # the last part may end beyond the buffer
        k = read(k_ref, (slice(None), here), real[:, None] & there[None, :]).astype(q.dtype)
        scores = dot(q, k, (((1,), (0,)), ((), ())))
        if scale_refs:
            scores = scores * read(scale_refs[0], (here,), there)[None, :]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < stop[:, None])
        scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(top, scores.max(axis=1))
        weights, kept = jnp.where(seen, jnp.exp(scores - new[:, None]), 0.0), jnp.exp(top - new)
        total = total * kept + weights.sum(axis=1)
        if scale_refs:
            weights = weights * read(scale_refs[1], (here,), there)[None, :]
        v = read(v_ref, (here, slice(None)), there[:, None] & real[None, :]).astype(q.dtype)
        mixed = mixed * kept[:, None] + dot(weights.astype(q.dtype), v, (((1,), (0,)), ((), ())))
        return new, total, mixed

    nothing = (jnp.full(first.shape, MASKED), jnp.zeros(first.shape), jnp.zeros(q.shape, jnp.float32))
    # A query that sees nothing, such as padding, must not widen what is read.
    sees = first < stop
    lowest = jnp.min(jnp.where(sees, first, length))
    highest = jnp.minimum(jnp.max(jnp.where(sees, stop, 0)), length)
    begin = jnp.maximum(lowest - start, 0) // COLUMNS
    end = pl.cdiv(jnp.clip(highest - start, 0, part), COLUMNS)
    top, total, mixed = jax.lax.fori_loop(begin, end, body, nothing)
    top_ref[...], total_ref[...], mixed_ref[...] = top, total, mixed
