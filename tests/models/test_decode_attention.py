"""Attention of one query: every variant equals one softmax over all columns; what is left out changes no bit."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from grpo_jax.mesh import make_mesh, single_device_mesh
from grpo_jax.models.decode_attention import (
    KEYS,
    KV_DTYPES,
    READERS,
    VALUES,
    Growing,
    Int8,
    Keeper,
    Seen,
    read_dense,
    seen_columns,
)
from grpo_jax.models.decode_pallas import read_split
from grpo_jax.models.layers import Compute
from grpo_jax.models.seats import Seats

CASES = {
    "plain": {},
    "one key head, odd head": {"kv_heads": 1, "group": 6, "head_dim": 7},
    "no groups": {"kv_heads": 4, "group": 1},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "window into the prompt, cap": {"window": 150, "softcap": 3.0},
    "cap": {"softcap": 2.5},
    "short buffers": {"width": 5, "length": 3},
    "uneven blocks": {"width": 131, "length": 197},
}
PROMPTS, SAMPLES = 3, 2
CUT, ONE = "window into the prompt, cap", "window of one"
FAST = {
    *(("plain", variant) for variant in READERS),
    *((CUT, variant) for variant in ("dense", "ragged", "pallas")),
    *((case, "pallas") for case in ("one key head, odd head", "short buffers", "uneven blocks")),
    ("no groups", "dense"),
    (ONE, "ragged"),
    ("uneven blocks", "ragged"),
}
"""What "buffered" reads here "dense" does too; its own buffer has a test."""

KEEP, WRITE = (jax.jit(f, static_argnums=0) for f in (Keeper.keep, Keeper.write))
GROWN, RESIZE = jax.jit(Keeper.grown, static_argnums=0), jax.jit(Keeper.resize, static_argnums=(0, 2))


def _keeper(variant, dtype="float32", kept="auto", mesh=None):
    compute = Compute(dtype, "highest" if dtype == "float32" else "default", mesh or single_device_mesh())
    return Keeper(compute, variant, kept)


def _int8(x):
    """What eight bits leave of it."""
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale


def _inputs(kv_heads=2, group=3, head_dim=16, width=96, length=200, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    rows = PROMPTS * SAMPLES
    q = draw(rows, kv_heads, group, head_dim) / head_dim**0.5 * 2
    prompt = draw(PROMPTS, kv_heads, width, head_dim), draw(PROMPTS, kv_heads, width, head_dim)
    own = draw(rows, kv_heads, length, head_dim), draw(rows, kv_heads, length, head_dim)
    prompt_len = np.array([width, 0, width // 2], np.int32)
    cache_len = np.array([0, length - 1, length // 2, 1, 0, length // 3], np.int32)
    return q, prompt, prompt_len, own, cache_len


def _oracle(q, prompt, prompt_len, own, cache_len, window=None, softcap=None):
    """One softmax over the concatenated columns, in float64, row by row."""
    out = np.zeros(q.shape)
    for row in range(len(q)):
        p = row // SAMPLES
        count, last = prompt_len[p], cache_len[row] + 1
        k, v = (
            np.concatenate([x[p, :, :count], y[row, :, :last]], axis=1).astype(np.float64)
            for x, y in zip(prompt, own, strict=True)
        )
        k, v = (x[:, -window:] if window else x for x in (k, v))
        scores = np.einsum("kgd,ksd->kgs", q[row], k)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[row] = np.einsum("kgs,ksd->kgd", weights / weights.sum(-1, keepdims=True), v)
    return out


@partial(jax.jit, static_argnums=(0, 6, 7))
def _attend(keeper, q, prompt, prompt_len, own, cache_len, window=None, softcap=None):
    q, prompt, own = jax.tree.map(lambda x: jnp.asarray(x, keeper.compute.dtype), (q, prompt, own))
    seats = Seats(len(prompt_len))
    seen = seen_columns(seats, prompt_len, cache_len, window)
    kept, mine = keeper.keep(*prompt), keeper.keep(*own)
    return keeper.attend(q, seats, kept, seen[0], [(mine, seen[1])], softcap)


@partial(jax.jit, static_argnums=(0, 10, 11))
def _step(keeper, q, prompt, prompt_len, own, new, keys, values, start, step, window, softcap):
    """As a segment has it: new keys and values to their own buffer, then attention over both."""
    seen = seen_columns(Seats(len(prompt_len)), prompt_len, start + step, window)
    new, kept = keeper.write(new, keys, values, step), keeper.keep(*prompt)
    before, since = seen[1].split(start)
    parts = [(own, before), (new, since)]
    return keeper.attend(q, Seats(len(prompt_len)), kept, seen[0], parts, softcap), new


@pytest.mark.parametrize(("case", "variant"), slow_but(FAST, itertools.product(CASES, READERS)))
def test_every_variant_equals_one_softmax_over_all_columns(variant, case):
    sizes = dict(CASES[case])
    rules = {name: sizes.pop(name, None) for name in ("window", "softcap")}
    inputs = _inputs(**sizes)
    want = _oracle(*inputs, **rules)
    got = _attend(_keeper(variant), *inputs, *rules.values())
    assert np.abs(got - want).max() < 2e-6


SEGMENTS = itertools.product(KV_DTYPES, ["plain", "window", CUT, "short buffers"])


@pytest.mark.parametrize(
    ("kept", "case"),
    slow_but({("auto", CUT), ("auto", "short buffers"), ("bfloat16", "window"), ("int8", "plain")}, SEGMENTS),
)
def test_a_segments_new_columns_are_kept_apart_and_joined(kept, case):
    """Every step is one softmax over all columns, and afterwards they lie as if each had been written in its place."""
    sizes, steps = dict(CASES[case]), 3
    rules = [sizes.pop(name, None) for name in ("window", "softcap")]
    q, prompt, prompt_len, own, _ = _inputs(**sizes)
    length, keeper = own[0].shape[2], _keeper("buffered", kept=kept)
    if kept == "bfloat16":
        prompt, own = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, kept), np.float32), (prompt, own))
    start = np.minimum([0, length - 3, length // 2, 1, 0, length // 3], length - steps).astype(np.int32)
    growing = keeper.grow(KEEP(keeper, *own), 4)  # a column is left over
    old, new = growing.old, growing.new
    for step in range(steps):
        rows = start + step
        now = [x[np.arange(len(q)), :, rows] for x in own]
        got, new = _step(keeper, q, prompt, prompt_len, old, new, *now, start, np.int32(step), *rules)
        read = [tuple(map(_int8, pair)) if kept == "int8" else pair for pair in (prompt, own)]
        want = _oracle(q, read[0], prompt_len, read[1], rows, *rules)
        assert np.abs(got - want).max() < 2e-6
    column = np.arange(length)[:, None]
    written = (column >= start[:, None, None, None]) & (column < start[:, None, None, None] + steps)
    other = [np.where(written, 7, x) for x in own]
    after = GROWN(keeper, Growing(KEEP(keeper, *other), new), start, np.int32(steps))
    jax.tree.map(np.testing.assert_array_equal, after, KEEP(keeper, *own))


def test_what_is_behind_the_last_column_is_not_joined():
    keeper = _keeper("buffered")
    own = _inputs(length=5)[3]
    growing = keeper.grow(KEEP(keeper, *own), 4)
    full = jax.tree.map(lambda x: x + 1, growing.new)
    after = GROWN(keeper, Growing(growing.old, full), np.full(6, 3, np.int32), np.int32(4))
    want = [x.copy() for x in own]
    for x in want:
        x[:, :, 3:] = 1
    jax.tree.map(np.testing.assert_array_equal, after, KEEP(keeper, *want))


WRITTEN = {(variant, kept) for variant in ("ragged", "buffered") for kept in KV_DTYPES}
"""Blocks, and one buffer, as "dense" and "pallas" have it."""


@pytest.mark.parametrize(("variant", "kept"), slow_but(WRITTEN, itertools.product(READERS, KV_DTYPES)))
def test_one_column_for_all_rows_is_written_as_each_rows_own_is(variant, kept):
    keeper = _keeper(variant, kept=kept)
    own = KEEP(keeper, *_inputs()[3])
    now = [x[:, :, 3] for x in _inputs(seed=1)[3]]
    for column in (0, 63, 64, 199, 200, 300):
        one = WRITE(keeper, own, *now, np.int32(column))
        jax.tree.map(np.testing.assert_array_equal, one, WRITE(keeper, own, *now, np.full(6, column, np.int32)))
        changed = any(jax.tree.leaves(jax.tree.map(lambda x, y: (np.asarray(x) != y).any(), one, own)))
        assert changed == (column < 200)


SPREAD = itertools.product(READERS, ["auto", "int8"])


@pytest.mark.parametrize(
    ("variant", "kept"), slow_but({("ragged", "auto"), ("buffered", "int8"), ("pallas", "int8")}, SPREAD)
)
def test_rows_and_heads_over_devices(variant, kept):
    """Two parts of the rows, four of the heads; nothing of the cache moves between devices."""
    q, prompt, prompt_len, own, cache_len = _inputs(kv_heads=4, group=2)
    rows, prompts = [0, 1, 2, 3, 4, 5, 2, 3], [0, 1, 2, 1]
    inputs = (
        q[rows],
        tuple(x[prompts] for x in prompt),
        prompt_len[prompts],
        tuple(x[rows] for x in own),
        cache_len[rows],
    )
    mesh = make_mesh(2, 1, 4)
    keeper = _keeper(variant, kept=kept, mesh=mesh)
    axes = jax.tree.map(lambda x: P("data", "tensor") if x.ndim == 4 else P("data"), inputs)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), inputs, axes)
    compiled = _attend.lower(keeper, *placed, 150).compile()
    got = compiled(*placed)
    left = (lambda pair: tuple(map(_int8, pair))) if kept == "int8" else lambda pair: pair
    want = _oracle(inputs[0], left(inputs[1]), inputs[2], left(inputs[3]), inputs[4], 150)
    assert np.abs(got - want).max() < 2e-6
    text = compiled.as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_takes_many_queries_and_columns_and_queries_that_see_nothing(scaled):
    """More queries than a program takes, more columns than fill one, in both of its forms."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 1, n, 24), np.float32) for n in (70, 700, 700))
    first = np.repeat(rng.integers(0, 700, (2, 35)), 2, axis=1).astype(np.int32)
    stop = np.minimum(first + rng.integers(0, 300, first.shape), 700).astype(np.int32)
    stop[:, 3] = first[:, 3]
    scales = tuple(rng.uniform(0.5, 2, (2, 1, 700)).astype(np.float32) for _ in range(2)) if scaled else None
    top, total, mixed = read_split(q, np.swapaxes(k, 2, 3), v, scales, first, stop, None, "highest", True)
    kept = [x if scales is None else x * scale[..., None] for x, scale in zip((k, v), scales or (1, 1), strict=True)]
    want = read_dense(_keeper("dense").compute, q, (np.swapaxes(kept[0], 2, 3),), (kept[1],), Seen(first, stop), None)
    sees = np.broadcast_to((stop > first)[:, None], top.shape)
    assert (np.asarray(total)[~sees] == 0).all() and (np.asarray(mixed)[~sees] == 0).all() and (~sees).any()
    np.testing.assert_allclose(top[sees], want.top[sees], atol=2e-5)
    got, wanted = mixed / total[..., None], want.mixed / want.total[..., None]
    assert np.abs(np.asarray(got - wanted)[sees]).max() < 2e-5
    np.testing.assert_allclose(total[sees], want.total[sees], rtol=2e-5)


@pytest.mark.parametrize("dtype", slow_but({"float32", "int8"}, ["float32", "bfloat16", "int8"]))
def test_the_kernel_is_one_that_triton_takes(dtype):
    """Lowered for CUDA, which needs no GPU: what only the interpreter knows would fail here."""
    of = jax.ShapeDtypeStruct
    compute = jnp.dtype("bfloat16" if dtype == "int8" else dtype)
    keys, values = of((4, 2, 96, 2000), jnp.dtype(dtype)), of((4, 2, 2000, 96), jnp.dtype(dtype))
    scale = of((4, 2, 2000), jnp.float32)
    bound, scales = of((4, 7), jnp.int32), (scale, scale) if dtype == "int8" else None
    call = partial(read_split, softcap=30.0, precision="highest" if dtype == "float32" else "default", interpret=False)
    abstract = AbstractMesh((1,), ("x",))
    if jax.__version_info__ >= (0, 11):  # which asks what GPU it is for
        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
        abstract = AbstractMesh((1,), ("x",), abstract_device=device)
    with use_abstract_mesh(abstract):
        traced = jax.jit(call).trace(of((4, 2, 7, 96), compute), keys, values, scales, bound, bound)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


EIGHT = itertools.product(["plain", CUT], READERS)


@pytest.mark.parametrize(("case", "variant"), slow_but({("plain", "pallas"), (CUT, "ragged"), (CUT, "dense")}, EIGHT))
def test_int8_is_the_softmax_over_what_eight_bits_leave(variant, case):
    rules = [CASES[case].get(name) for name in ("window", "softcap")]
    q, prompt, prompt_len, own, cache_len = _inputs()
    want = _oracle(q, tuple(map(_int8, prompt)), prompt_len, tuple(map(_int8, own)), cache_len, *rules)
    got = _attend(_keeper(variant, kept="int8"), q, prompt, prompt_len, own, cache_len, *rules)
    assert np.abs(got - want).max() < 2e-6
    exact = np.abs(got - _oracle(q, prompt, prompt_len, own, cache_len, *rules))
    assert 1e-4 < exact.max() < 0.03


@pytest.mark.parametrize("variant", slow_but({"ragged", "pallas"}, READERS))
def test_bfloat16_is_near_the_oracle(variant):
    inputs = _inputs()
    got = _attend(_keeper(variant, "bfloat16"), *inputs)
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(got.astype(np.float32) - _oracle(*inputs)).max() < 0.04


@pytest.mark.parametrize("variant", slow_but({"ragged", "pallas"}, READERS))
def test_a_row_depends_on_its_own_columns_alone(variant):
    """To the bit: neither on how far its neighbours are, which decides what is left out, nor on what lies beyond."""
    q, prompt, prompt_len, own, cache_len = _inputs()
    alone = np.array([0, 0, cache_len[2], 0, 0, 0], np.int32)
    stale = tuple(np.where(np.arange(200)[:, None] > cache_len[:, None, None, None], 50.0, x) for x in own)
    for window in (None, 9):
        want = _attend(_keeper(variant), q, prompt, prompt_len, own, cache_len, window, None)
        other = _attend(_keeper(variant), q, prompt, prompt_len, stale, alone, window, None)
        assert np.array_equal(want[2], other[2]) and np.array_equal(want[0], other[0])


@pytest.mark.parametrize("kept", KV_DTYPES)
def test_blocks_are_written_and_resized_like_one_buffer(kept):
    keeper, plain = _keeper("ragged", kept=kept), _keeper("dense", kept=kept)
    rng = np.random.default_rng(1)
    assert len(keeper.widths(200)) == 3 and plain.widths(200) == [200] and sum(keeper.widths(1000)) == 1000
    columns = np.array([0, 66, 67, 199, 200, 133], np.int32)
    states = [each.empty(6, 2, 200, 4) for each in (keeper, plain)]
    for _ in range(3):
        new = rng.standard_normal((2, 6, 2, 4), np.float32)
        states = [WRITE(each, state, *new, columns) for each, state in zip((keeper, plain), states, strict=True)]
        columns = columns + 1
    for length in (200, 90, 500):
        blocks, whole = (RESIZE(each, x, length) for each, x in zip((keeper, plain), states, strict=True))
        for axis, some, one in zip((KEYS, VALUES), blocks, whole, strict=True):
            assert [x.shape[axis] for x in some] == keeper.widths(length)
            joined = jax.tree.map(partial(lambda *x, axis: np.concatenate(x, axis=axis), axis=axis), *some)
            for got, want in zip(jax.tree.leaves(joined), jax.tree.leaves(one[0]), strict=True):
                assert np.array_equal(got, want) and np.abs(want.astype(np.float32)).max() > 0
    dtypes = {str(x.dtype) for x in jax.tree.leaves(states)}
    assert dtypes == {"auto": {"float32"}, "int8": {"int8", "float32"}}.get(kept, {kept})


def test_int8_is_at_most_half_a_step_off_and_keeps_zeros():
    x = np.random.default_rng(0).standard_normal((5, 3, 7), np.float32) * np.float32([[1e-20], [1], [1e20]])
    x[0, 0] = 0
    kept = Int8.of(x)
    back = np.asarray(kept.values * kept.scale)
    assert (np.abs(back - x) <= np.asarray(kept.scale) * 0.5001).all() and (back[0, 0] == 0).all()
    assert np.abs(kept.values).max() == 127 and kept.shape == x.shape


def test_a_block_that_no_row_sees_is_not_read():
    """NaN there would show: the other variant reads it, and multiplies it by zero."""
    keeper = _keeper("ragged")
    q, prompt, prompt_len, own, _ = _inputs()
    broken = tuple(np.where(np.arange(200)[:, None] >= 134, np.nan, x) for x in own)
    got = _attend(keeper, q, prompt, prompt_len, broken, np.full(6, 133, np.int32), None, None)
    assert np.isfinite(got).all()
    seen = _attend(keeper, q, prompt, prompt_len, broken, np.full(6, 134, np.int32), None, None)
    assert not np.isfinite(seen).all()
