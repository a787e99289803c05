"""Rows that decode together: their state as one donated pytree, and the compiled functions over it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.decode_attention import KeyValue, Own
from grpo_jax.models.model import Cache, Model, PromptCache, View
from grpo_jax.models.prefill import CHUNK
from grpo_jax.models.seats import Seats
from grpo_jax.rollout.sampling import History, Sampling, address_keys, sample, uniforms
from grpo_jax.rollout.shapes import Shape

Carry = tuple["Rows", tuple[Own, ...], jax.Array, jax.Array]
"""Of a decode step: rows, their keys and values, who is live, steps done."""
SEGMENT = 32
"""Most steps between two looks at the rows."""
PREFILL_TOKENS = 8192
"""Prompt tokens that go through the model at once; more go one part after the other."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What is known of the rows beside their keys and values.

    Attributes:
        token: [B] int32, the newest token, to be fed next; at first the prompt's last.
        length: [B] int32, tokens sampled.
        limit: [B] int32, tokens to sample at most.
        stopped: [B] bool, a stop token was drawn.
        keys: [B, 2] uint32, key data from which the uniforms come.
        tokens: [B, C] int32, sampled; what follows ``length`` means nothing.
        logp: [B, C] float32, of each in the tempered distribution.
        drawn_logp: [B, C] float32, of each in the distribution drawn from; None where it is the tempered one.
    """

    token: jax.Array
    length: jax.Array
    limit: jax.Array
    stopped: jax.Array
    keys: jax.Array
    tokens: jax.Array
    logp: jax.Array
    drawn_logp: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Everything a decode step changes; donated.

    Attributes:
        rows: see `Rows`.
        cache: keys and values of C columns, a pair a layer. Column 0 is the prompt's last token, column t what was
            sampled t-th.
    """

    rows: Rows
    cache: Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """The prompts that rows go on from, all but each one's last token; one for each block of rows.

    Attributes:
        cache: keys and values of P columns, a pair a layer.
        length: [R] int32, columns of it that hold tokens: may be 0.
        tokens: [R, P] int32, the prompts with their last token.
    """

    cache: PromptCache
    length: jax.Array
    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seating:
    """Who sits where after a move; host arrays.

    Attributes:
        source: [B] int32, slot in which a row sat before; any for a fresh one.
        fresh: [B] bool, begins now.
        token: [B] int32, last token of the prompt.
        limit: [B] int32.
        keys: [B, 2] uint32, see `row_key_data`.
        prompt: [R] int32, the block in which a prompt stood before, those of a second context counted on.
    """

    source: Any
    fresh: Any
    token: Any
    limit: Any
    keys: Any
    prompt: Any


@jax.jit
def row_key_data(address: jax.Array, round_: jax.Array) -> jax.Array:
    """`address_keys` as [N, 2] uint32."""
    return jax.random.key_data(address_keys(address, round_))


@partial(jax.jit, static_argnums=0)
def prefill(model: Model, view: View, tokens: jax.Array, length: jax.Array) -> Context:
    """Prompts [R, P] of ``length`` [R] -> their cache without the last token, which the rows feed themselves."""
    count, width = tokens.shape
    part = _part(count, row_shards(model), PREFILL_TOKENS // min(width, CHUNK))

    def some(arrays: tuple[jax.Array, jax.Array]) -> PromptCache:
        return model.prefill(view, *arrays)[1]

    if part == count:
        cache = some((tokens, length - 1))
    else:
        cut = tokens.reshape(-1, part, width), (length - 1).reshape(-1, part)
        cache = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(some, cut))
    return _pin_context(model, Context(cache, length - 1, tokens))


def row_shards(model: Model) -> int:
    """Devices over which rows are cut."""
    return model.compute.mesh.shape["data"] * model.compute.mesh.shape["fsdp"]


def _part(count: int, shards: int, most: int) -> int:
    """The largest part of ``count`` prompts that divides it, is cut evenly over the devices and is at most ``most``."""
    even = [n for n in range(shards, count + 1, shards) if count % n == 0] or [count]
    return max((n for n in even if n <= most), default=even[0])


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def segment(
    model: Model,
    rules: Sampling,
    view: View,
    context: Context,
    slots: Slots,
    live: jax.Array,
    seats: Seats,
    temperature: jax.Array,
    steps: jax.Array,
    few: jax.Array,
) -> tuple[Slots, jax.Array]:
    """Decode until ``steps`` steps are done or at most ``few`` rows are live.

    Args:
        model: static.
        rules: static.
        view: from `Model.decode_view`.
        context: of the rows' prompts.
        slots: donated.
        live: [B] bool, rows that go on; each has fewer tokens than its limit and the cache's length.
        seats: which of them goes on from which prompt.
        temperature: scalar.
        steps: scalar int32, at most `SEGMENT`.
        few: scalar int32.

    Returns:
        The slots, and what the host reads: int32 [4, B] of length, live, stopped and steps done.
    """
    stop_ids = jnp.asarray(rules.stop_ids, jnp.int32)
    keys = jax.random.wrap_key_data(slots.rows.keys, impl="threefry2x32")

    def body(carry: Carry) -> Carry:
        rows, cache, live, done = carry
        column = jnp.where(live, rows.length, done)  # what a row that is done has kept is read no more
        prompts = context.cache, context.length
        hidden, cache = model.decode(view, *prompts, cache, column, rows.token, seats, done)
        u, history = uniforms(keys, rows.length), _history(rules, context, rows, seats)
        whole = partial(_pin_leaf, model)
        drawn = sample(model.head(view, hidden), u, rules, temperature, history, whole)
        rows, live = _record(rows, live, drawn, stop_ids)
        return rows, cache, live, done + 1

    def more(carry: Carry) -> jax.Array:
        _, _, live, done = carry
        return (done < steps) & (live.sum() > few)

    begin = slots.rows, model.grow(slots.cache, SEGMENT), live, jnp.int32(0)
    rows, cache, live, done = jax.lax.while_loop(more, body, begin)
    cache = model.grown(cache, slots.rows.length, done)
    status = jnp.stack([rows.length, live.astype(jnp.int32), rows.stopped.astype(jnp.int32), done + 0 * rows.length])
    return Slots(_pin(model, rows), _pin_cache(model, cache)), model.compute.shard(status, None, None)


def _history(rules: Sampling, context: Context, rows: Rows, seats: Seats) -> History | None:
    if not rules.changed:
        return None
    tokens, length = (seats.spread(x, rows.length.shape[0]) for x in (context.tokens, context.length))
    return History(rows.length, rows.tokens, tokens, length + 1)


def _record(
    rows: Rows, live: jax.Array, drawn: tuple[jax.Array, jax.Array, jax.Array | None], stop_ids: jax.Array
) -> tuple[Rows, jax.Array]:
    """The rows with what was drawn for the live ones, and which of them go on."""
    token, logp, drawn_logp = drawn
    stop = (token[:, None] == stop_ids).any(-1)
    row = jnp.arange(live.shape[0])
    at = jnp.where(live, rows.length, rows.tokens.shape[1])  # a row that is done writes nowhere

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return buffer.at[row, at].set(value, mode="drop")

    length = rows.length + live
    kept = None if drawn_logp is None or rows.drawn_logp is None else put(rows.drawn_logp, drawn_logp)
    after = Rows(
        token=jnp.where(live, token, rows.token),
        length=length,
        limit=rows.limit,
        stopped=rows.stopped | (live & stop),
        keys=rows.keys,
        tokens=put(rows.tokens, token),
        logp=put(rows.logp, logp),
        drawn_logp=kept,
    )
    return after, live & ~stop & (length < rows.limit)


@partial(jax.jit, static_argnums=(0, 1, 2))
def open_slots(model: Model, shape: Shape, rules: Sampling, seating: Seating) -> Slots:
    """Slots whose rows are all fresh."""
    zeros = partial(jnp.zeros, (shape.rows, shape.length))
    number, flag = jnp.zeros(shape.rows, jnp.int32), jnp.zeros(shape.rows, bool)
    drawn = zeros(jnp.float32) if rules.changed else None
    rows = Rows(seating.token, number, seating.limit, flag, seating.keys, zeros(jnp.int32), zeros(jnp.float32), drawn)
    return Slots(_pin(model, rows), model.init_cache(shape.rows, shape.length))


@partial(jax.jit, static_argnums=(0, 1))
def move_rows(
    model: Model, length: int, rows: Rows, small: list[tuple[jax.Array, jax.Array]], seating: Seating
) -> tuple[Rows, list[tuple[jax.Array, jax.Array]]]:
    """Rows to other slots, cut or lengthened to ``length`` columns, and the small arrays of their prompts."""
    fresh = seating.fresh
    take = partial(jnp.take, indices=seating.source, axis=0, mode="clip")

    def columns(buffer: jax.Array) -> jax.Array:
        return _resize(take(buffer), 1, length)

    moved = Rows(
        token=jnp.where(fresh, seating.token, take(rows.token)),
        length=jnp.where(fresh, 0, take(rows.length)),
        limit=seating.limit,
        stopped=~fresh & take(rows.stopped),
        keys=seating.keys,
        tokens=columns(rows.tokens),
        logp=columns(rows.logp),
        drawn_logp=None if rows.drawn_logp is None else columns(rows.drawn_logp),
    )
    return _pin(model, moved), _pick(model, small, seating.prompt)


@partial(jax.jit, static_argnums=(0, 1))
def move_layer(
    model: Model, length: int, own: KeyValue, prompts: list[KeyValue], seating: Seating
) -> tuple[KeyValue, list[KeyValue]]:
    """One layer's own keys and values, and those of the prompts: a layer at a time, so that one is held twice."""
    taken = jax.tree.map(lambda x: jnp.take(x, seating.source, axis=0, mode="clip"), own)
    return model.resize_cache(taken, length), _pick(model, prompts, seating.prompt)


@partial(jax.jit, static_argnums=0)
def seat_context(model: Model, context: Context, index: jax.Array) -> Context:
    """The prompts at ``index`` [R]."""
    return _pick(model, [context], index)[0]


def _pick(model: Model, sources: list[Any], index: jax.Array) -> list[Any]:
    """The rows at ``index`` of one pytree, or of two whose rows count on; a list of one pytree, or an empty one."""
    if not sources:
        return []

    def one(first: jax.Array, second: jax.Array | None = None) -> jax.Array:
        picked = jnp.take(first, index, axis=0, mode="clip")
        if second is not None:
            other = jnp.take(second, index - first.shape[0], axis=0, mode="clip")
            picked = jnp.where((index < first.shape[0]).reshape(-1, *[1] * (picked.ndim - 1)), picked, other)
        return _pin_leaf(model, picked)

    return [jax.tree.map(one, *sources)]


def _resize(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Longer by zeros, or cut."""
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad)


def axes_of(ndim: int) -> tuple[str | None, ...]:
    """Logical axes of an array of rows: keys and values have four, everything else is cut by rows only."""
    return ("batch", "kv_heads", None, None) if ndim == 4 else ("batch", *[None] * (ndim - 1))


def _pin_leaf(model: Model, x: jax.Array) -> jax.Array:
    return model.compute.shard(x, *axes_of(x.ndim))


def _pin(model: Model, rows: Rows) -> Rows:
    """Laid out the same by every function, so that none compiles twice for one shape."""
    return jax.tree.map(partial(_pin_leaf, model), rows)


def _pin_cache(model: Model, cache: Cache) -> Cache:
    return jax.tree.map(partial(_pin_leaf, model), cache)


def _pin_context(model: Model, context: Context) -> Context:
    return jax.tree.map(partial(_pin_leaf, model), context)
