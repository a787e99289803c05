"""Attention of decoding: one query a row, over keys and values that were kept.

A ``Keeper`` says how they are kept and read. What is kept of one layer's keys, or of its values, is a tuple of blocks
that follow one another along the columns: one block, or several where that lets a step leave out the blocks that no row
sees. A block of its own costs nothing to leave out; a slice of a longer buffer is copied first. A block of values is
[R, K, c, d]; one of keys [R, K, d, c], so that a query's scores lie side by side in memory as the keys they come from.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grpo_jax.mesh import spec_for
from grpo_jax.models.attention import MASKED, cap
from grpo_jax.models.decode_write import KEYS, VALUES, put, put_behind, put_together
from grpo_jax.models.layers import Compute
from grpo_jax.models.seats import Seats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Numbers in eight bits, ``values * scale``: each token of each head has the scale of its largest.

    Attributes:
        values: [..., d] int8, from -127 to 127; or of keys [R, K, d, c].
        scale: [..., 1] float32; or of keys [R, K, 1, c].
    """

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> "Int8":
        """[..., d] to the nearest of 255 steps; zeros stay zeros."""
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return cls(jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape


Block = jax.Array | Int8
"""Some columns of keys [R, K, d, c], or of values [R, K, c, d]."""

Blocks = tuple[Block, ...]
"""Keys, or values, of one layer."""

KeyValue = tuple[Blocks, Blocks]
"""Keys and values of one layer."""


class Growing(NamedTuple):
    """Keys and values of one layer within a segment of decoding.

    Attributes:
        old: what there was when it began; not written within it.
        new: [R, ...], the columns since: column t of every row is of the segment's step t.
    """

    old: KeyValue
    new: KeyValue


Own = KeyValue | Growing
"""What rows have sampled, of one layer."""

MOST_BLOCKS = 8
"""Blocks of one buffer, unless it is very long: each is a branch of the program, compiled for itself."""
MOST_COLUMNS = 512
"""Of a block: XLA's products on the CPU get several times slower beyond."""
LEAST_COLUMNS = 64
"""Of a block of what rows sample: a shorter one costs as much as the branch around it."""
LEAST_PROMPT_COLUMNS = 128
"""Of a block of prompts. They are read once for a group, and most of their columns are seen from the start."""


class Seen(NamedTuple):
    """The columns that queries see: ``first <= column < stop``.

    Attributes:
        first, stop: [R, M] int32, or [R, 1] where all queries of a row see the same.
    """

    first: jax.Array
    stop: jax.Array

    def mask(self, start: int, count: int) -> jax.Array:
        """Bool [R, M or 1, count], of ``count`` columns from ``start`` on."""
        columns = start + jnp.arange(count)
        return (columns >= self.first[..., None]) & (columns < self.stop[..., None])

    def split(self, at: jax.Array) -> "tuple[Seen, Seen]":
        """What is seen of the columns before ``at`` [R], and of those from there on, counted anew."""
        at = at[:, None]
        return Seen(self.first, jnp.minimum(self.stop, at)), Seen(self.first - at, self.stop - at)

    def any(self, start: int, count: int) -> jax.Array:
        """Whether some query sees one of ``count`` columns from ``start`` on."""
        return (jnp.maximum(self.first, start) < jnp.minimum(self.stop, start + count)).any()


class Part(NamedTuple):
    """Softmax over some of the columns, to be continued or joined with others (Milakov and Gimelshein 2018).

    Attributes:
        top: [R, K, M] float32, the largest score.
        total: [R, K, M] float32, sum of ``exp(score - top)``.
        mixed: [R, K, M, d] float32, the values so weighted.
    """

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


def empty_part(q: jax.Array) -> Part:
    """No column yet, for queries [R, K, M, d]."""
    zeros = jnp.zeros(q.shape, jnp.float32)
    return Part(jnp.full(q.shape[:-1], MASKED, jnp.float32), zeros[..., 0], zeros)


def join_parts(one: Part, two: Part) -> Part:
    """Both together."""
    top = jnp.maximum(one.top, two.top)
    x, y = jnp.exp(one.top - top), jnp.exp(two.top - top)
    mixed = one.mixed * x[..., None] + two.mixed * y[..., None]
    return Part(top, one.total * x + two.total * y, mixed)


Read = Callable[[Compute, jax.Array, Blocks, Blocks, Seen, float | None], Part]
"""(compute, q [R, K, M, d], keys, values, seen, softcap) -> what all M queries of each row read."""


def read_dense(compute: Compute, q: jax.Array, keys: Blocks, values: Blocks, seen: Seen, softcap: float | None) -> Part:
    """Every block, whoever sees it."""
    return _fold(compute, q, keys, values, seen, softcap, skip=False)


def read_ragged(
    compute: Compute, q: jax.Array, keys: Blocks, values: Blocks, seen: Seen, softcap: float | None
) -> Part:
    """The blocks that some query sees. A block that a row does not see changes nothing of the row, to the bit."""
    return _fold(compute, q, keys, values, seen, softcap, skip=len(keys) > 1)


def _fold(
    compute: Compute, q: jax.Array, keys: Blocks, values: Blocks, seen: Seen, softcap: float | None, skip: bool
) -> Part:
    part, start = empty_part(q), 0
    for k, v in zip(keys, values, strict=True):
        count = v.shape[VALUES]

        def absorb(part: Part, k: Block, v: Block, start: int = start, count: int = count) -> Part:
            keys, key_scale = _numbers(k, compute, KEYS)
            scores = cap(compute.einsum("rkmd,rkdc->rkmc", q, keys, out=jnp.float32) * key_scale, softcap)
            scores = jnp.where(seen.mask(start, count)[:, None], scores, MASKED)
            top = jnp.maximum(part.top, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - top[..., None]), jnp.exp(part.top - top)
            values, scale = _numbers(v, compute, VALUES)
            scaled = (weights * scale).astype(compute.dtype)
            mixed = compute.einsum("rkmc,rkcd->rkmd", scaled, values, out=jnp.float32)
            return Part(top, part.total * kept + weights.sum(axis=-1), part.mixed * kept[..., None] + mixed)

        if skip:
            part = jax.lax.cond(seen.any(start, count), absorb, lambda part, k, v: part, part, k, v)
        else:
            part = absorb(part, k, v)
        start += count
    return part


def _numbers(block: Block, compute: Compute, axis: int) -> tuple[jax.Array, jax.Array | float]:
    """The block in the compute dtype, and the factor of each column, [R, K, 1, c] or 1."""
    if isinstance(block, Int8):
        return block.values.astype(compute.dtype), jnp.swapaxes(block.scale, axis, 3)
    return block.astype(compute.dtype), 1.0


def read_pallas(
    compute: Compute, q: jax.Array, keys: Blocks, values: Blocks, seen: Seen, softcap: float | None
) -> Part:
    """By a kernel for GPUs, the columns split over programs; on other platforms by its interpreter, for tests."""
    from grpo_jax.models.decode_pallas import read_split  # an experimental part of jax, where it is asked for only

    mesh, ((k,), (v,)) = compute.mesh, (keys, values)
    seen = Seen(*(jnp.broadcast_to(x, (q.shape[0], q.shape[2])) for x in seen))
    interpret = mesh.devices.flat[0].platform != "gpu"

    def read(q: jax.Array, k: Block, v: Block, seen: Seen) -> tuple[jax.Array, jax.Array, jax.Array]:
        scales = (k.scale[:, :, 0], v.scale[..., 0]) if isinstance(k, Int8) and isinstance(v, Int8) else None
        keys, values = (x.values if isinstance(x, Int8) else x for x in (k, v))
        bounds = seen.first, seen.stop
        return read_split(q, keys, values, scales, *bounds, softcap, compute.precision, interpret)

    if mesh.size == 1:
        return Part(*read(q, k, v, seen))
    # A kernel is not cut by the compiler: every device runs it on its rows and heads.
    heads = spec_for(("batch", "kv_heads", None, None), q.shape, mesh)
    rows, short = PartitionSpec(heads[0], None), PartitionSpec(*heads[:3])
    specs, out = (heads, heads, heads, rows), (short, short, heads)
    return Part(*jax.shard_map(read, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(q, k, v, seen))


READERS: Mapping[str, Read] = {
    "dense": read_dense,
    "ragged": read_ragged,
    "buffered": read_dense,
    "pallas": read_pallas,
}
"""Variant -> how it reads. "buffered" keeps the columns of a segment apart until it ends, see `Keeper.grow`."""

KV_DTYPES = ("auto", "bfloat16", "int8")

DEFAULTS: Mapping[str, str] = {"cpu": "ragged", "tpu": "buffered"}
"""Platform -> the variant that "auto" takes there; "dense" elsewhere. Only the CPU's was run on hardware."""


@dataclass(frozen=True)
class Keeper:
    """How keys and values are kept for decoding, and how they are read.

    Attributes:
        compute: dtype, precision, mesh.
        attention: key of ``READERS``, or "auto".
        dtype: of what is kept: one of ``KV_DTYPES``, "auto" is that of ``compute``.
    """

    compute: Compute
    attention: str = "auto"
    dtype: str = "auto"

    @property
    def variant(self) -> str:
        """Key of ``READERS``."""
        platform = self.compute.mesh.devices.flat[0].platform
        return DEFAULTS.get(platform, "dense") if self.attention == "auto" else self.attention

    def widths(self, length: int, least: int = LEAST_COLUMNS) -> list[int]:
        """Columns of each block of a buffer of ``length`` columns: ``least`` or more, of one width but for the last."""
        if self.variant != "ragged":
            return [length]
        count = max(1, min(MOST_BLOCKS, length // least), math.ceil(length / MOST_COLUMNS))
        width = math.ceil(length / count)
        return [min(width, length - start) for start in range(0, length, width)]

    def empty(self, rows: int, kv_heads: int, length: int, head_dim: int, least: int = LEAST_COLUMNS) -> KeyValue:
        """Zeros, rows over data and fsdp, key heads over tensor; ``least`` as of ``widths``."""

        def zeros(axis: int) -> Blocks:
            made = []
            for width in self.widths(length, least):
                some = jax.ShapeDtypeStruct((rows, kv_heads, width, head_dim), self.compute.dtype)
                block = jax.eval_shape(lambda x: _turned(self._encode(x), axis), some)
                made.append(self._pin(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), block)))
            return tuple(made)

        return zeros(KEYS), zeros(VALUES)

    def keep(self, keys: jax.Array, values: jax.Array, least: int = LEAST_COLUMNS) -> KeyValue:
        """Keys and values, each [R, K, C, d] -> what is kept of them; ``least`` as of ``widths``."""
        cut = partial(self._cut, least=least)
        return cut(_turned(self._encode(keys), KEYS), KEYS), cut(self._encode(values), VALUES)

    def write(self, kept: KeyValue, keys: jax.Array, values: jax.Array, column: jax.Array) -> KeyValue:
        """Puts new keys and values, each [R, K, d], at column ``column``, [R] or one for all; none from C on."""
        one = put if column.ndim else put_together

        def over(blocks: Blocks, new: Block, axis: int) -> Blocks:
            out, start = [], 0
            for block in blocks:
                width = block.shape[axis]
                at = jnp.where(column < start, width, column - start)
                out.append(jax.tree.map(partial(one, column=at, axis=axis), block, new))
                start += width
            return tuple(out)

        return over(kept[0], self._encode(keys), KEYS), over(kept[1], self._encode(values), VALUES)

    def grow(self, kept: KeyValue, steps: int) -> Own:
        """For a segment of at most ``steps``: "buffered" writes new columns to a buffer of their own.

        XLA lays a cache out on a TPU for what a loop writes to it, which is not how it is best kept and read; one that
        is only read stays as it is.
        """
        if self.variant != "buffered":
            return kept

        def buffer(blocks: Blocks, axis: int) -> Blocks:
            def zeros(x: jax.Array) -> jax.Array:
                return jnp.zeros((*x.shape[:axis], steps, *x.shape[axis + 1 :]), x.dtype)

            return (self._pin(jax.tree.map(zeros, blocks[0])),)

        return Growing(kept, (buffer(kept[0], KEYS), buffer(kept[1], VALUES)))

    def add(
        self, own: Own, keys: jax.Array, values: jax.Array, column: jax.Array, step: jax.Array | None, seen: Seen
    ) -> tuple[Own, list[tuple[KeyValue, Seen]]]:
        """One more column, of each row: what there is then, and the parts of it that are read as ``seen``.

        Args:
            own: of B rows.
            keys, values: [B, K, d].
            column: [B] int32, where it goes.
            step: scalar int32, columns since the segment began; where none did None.
            seen: [B, 1], counted over all columns.
        """
        if not isinstance(own, Growing):
            own = self.write(own, keys, values, column)
            return own, [(own, seen)]
        assert step is not None
        new = self.write(own.new, keys, values, step)
        before, since = seen.split(column - step)
        return Growing(own.old, new), [(own.old, before), (new, since)]

    def grown(self, kept: Own, start: jax.Array, steps: jax.Array) -> KeyValue:
        """After so many steps: the buffer's columns behind those that rows had, ``start`` [R]."""
        if not isinstance(kept, Growing):
            return kept

        def join(old: Blocks, new: Blocks, axis: int) -> Blocks:
            ((block,), (buffer,)) = old, new
            return (self._pin(jax.tree.map(partial(put_behind, start=start, steps=steps, axis=axis), block, buffer)),)

        return join(kept.old[0], kept.new[0], KEYS), join(kept.old[1], kept.new[1], VALUES)

    def resize(self, kept: KeyValue, length: int) -> KeyValue:
        """Longer by zeros, or cut."""

        def one(*cut: jax.Array, axis: int) -> jax.Array:
            joined = jnp.concatenate(cut, axis=axis)
            more = [(0, 0)] * joined.ndim
            more[axis] = (0, max(0, length - joined.shape[axis]))
            return jax.lax.slice_in_dim(jnp.pad(joined, more), 0, length, axis=axis)

        keys, values = (jax.tree.map(partial(one, axis=axis), *x) for x, axis in zip(kept, (KEYS, VALUES), strict=True))
        return self._cut(keys, KEYS), self._cut(values, VALUES)

    def _encode(self, x: jax.Array) -> Block:
        if self.dtype == "int8":
            return Int8.of(x)
        return x.astype(self.compute.dtype if self.dtype == "auto" else self.dtype)

    def _cut(self, whole: Block, axis: int, least: int = LEAST_COLUMNS) -> Blocks:
        out, start = [], 0
        for width in self.widths(whole.shape[axis], least):
            cut = partial(jax.lax.slice_in_dim, start_index=start, limit_index=start + width, axis=axis)
            out.append(self._pin(jax.tree.map(cut, whole)))
            start += width
        return tuple(out)

    def _pin(self, block: Block) -> Block:
        return jax.tree.map(lambda x: self.compute.shard(x, "batch", "kv_heads", None, None), block)

    def attend(
        self,
        q: jax.Array,
        seats: Seats,
        prompt: KeyValue,
        prompt_seen: Seen,
        own: Sequence[tuple[KeyValue, Seen]],
        softcap: float | None,
    ) -> jax.Array:
        """One query a row over its prompt's keys, which its group shares, and its own: one softmax over both.

        Args:
            q: [B, K, g, d].
            seats: of the B rows on the Q prompts, up to G on each.
            prompt: of Q rows; a group's queries are stacked on it, so that it is read once.
            prompt_seen: [Q, G] or [Q, 1].
            own: of B rows, in parts, and what is seen of each, [B, 1]; one column at least of each row.
            softcap: of the scores, see ``cap``.

        Returns:
            [B, K, g, d].
        """
        (_, kv_heads, group, head_dim), prompts = q.shape, prompt[1][0].shape[0]
        stacked = jnp.swapaxes(seats.stack(q), 1, 2).reshape(prompts, kv_heads, -1, head_dim)
        if prompt_seen.first.shape[1] > 1:
            prompt_seen = Seen(*(jnp.repeat(x, group, axis=1) for x in prompt_seen))
        read = READERS[self.variant]
        far = read(self.compute, stacked, *prompt, prompt_seen, softcap)

        def to_rows(x: jax.Array) -> jax.Array:  # [Q, K, G * g, ...] -> [B, K, g, ...]
            return seats.unstack(jnp.swapaxes(x.reshape(prompts, kv_heads, -1, group, *x.shape[3:]), 1, 2))

        both = Part(*map(to_rows, far))
        for kept, seen in own:
            both = join_parts(both, read(self.compute, q, *kept, seen, softcap))
        return (both.mixed / both.total[..., None]).astype(self.compute.dtype)


def _turned(block: Block, axis: int) -> Block:
    """[R, K, c, d] -> a block with its columns at ``axis``."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 2, axis), block)


def columns(kept: KeyValue) -> int:
    """C, of all blocks together."""
    return sum(block.shape[VALUES] for block in kept[1])


def seen_columns(seats: Seats, prompt_len: jax.Array, cache_len: jax.Array, window: int | None) -> tuple[Seen, Seen]:
    """What the token at column ``cache_len`` [B] sees: of its prompt, ``prompt_len`` [Q], and of its row."""
    stop, own_stop = prompt_len[:, None], cache_len[:, None] + 1
    if window is None:
        return Seen(jnp.zeros_like(stop), stop), Seen(jnp.zeros_like(own_stop), own_stop)
    last = stop + seats.stack(cache_len)  # [Q, G]
    return Seen(last + 1 - window, jnp.broadcast_to(stop, last.shape)), Seen(own_stop - window, own_stop)
