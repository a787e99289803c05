"""Attention of one query: every variant equals one softmax over all columns; what is left out changes no bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.mesh import single_device_mesh
from grpo_jax.models.decode_attention import KV_DTYPES, READERS, Int8, Keeper, seen_columns
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


def _keeper(variant, dtype="float32", kept="auto"):
    compute = Compute(dtype, "highest" if dtype == "float32" else "default", single_device_mesh())
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
    kept, mine = (tuple(keeper.keep(x) for x in pair) for pair in (prompt, own))
    return keeper.attend(q, seats, kept, seen[0], mine, seen[1], softcap)


@pytest.mark.parametrize("variant", READERS)
@pytest.mark.parametrize("case", CASES)
def test_every_variant_equals_one_softmax_over_all_columns(variant, case):
    sizes = dict(CASES[case])
    rules = {name: sizes.pop(name, None) for name in ("window", "softcap")}
    inputs = _inputs(**sizes)
    want = _oracle(*inputs, **rules)
    got = _attend(_keeper(variant), *inputs, *rules.values())
    assert np.abs(got - want).max() < 2e-6


@pytest.mark.parametrize("variant", READERS)
@pytest.mark.parametrize("case", ["plain", "window into the prompt, cap"])
def test_int8_is_the_softmax_over_what_eight_bits_leave(variant, case):
    rules = [CASES[case].get(name) for name in ("window", "softcap")]
    q, prompt, prompt_len, own, cache_len = _inputs()
    want = _oracle(q, tuple(map(_int8, prompt)), prompt_len, tuple(map(_int8, own)), cache_len, *rules)
    got = _attend(_keeper(variant, kept="int8"), q, prompt, prompt_len, own, cache_len, *rules)
    assert np.abs(got - want).max() < 2e-6
    exact = np.abs(got - _oracle(q, prompt, prompt_len, own, cache_len, *rules))
    assert 1e-4 < exact.max() < 0.03


@pytest.mark.parametrize("variant", READERS)
def test_bfloat16_is_near_the_oracle(variant):
    inputs = _inputs()
    got = _attend(_keeper(variant, "bfloat16"), *inputs)
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < np.abs(got.astype(np.float32) - _oracle(*inputs)).max() < 0.04


@pytest.mark.parametrize("variant", READERS)
def test_a_row_depends_on_its_own_columns_alone(variant):
    """To the bit: neither on how far its neighbours are, which decides what is left out, nor on what lies beyond."""
    q, prompt, prompt_len, own, cache_len = _inputs()
    alone = np.array([0, 0, cache_len[2], 0, 0, 0], np.int32)
    stale = tuple(np.where(np.arange(200)[:, None] > cache_len[:, None, None, None], 50.0, x) for x in own)
    for window in (None, 9):
        want = _attend(_keeper(variant), q, prompt, prompt_len, own, cache_len, window)
        other = _attend(_keeper(variant), q, prompt, prompt_len, stale, alone, window)
        assert np.array_equal(want[2], other[2]) and np.array_equal(want[0], other[0])


@pytest.mark.parametrize("kept", KV_DTYPES)
def test_blocks_are_written_and_resized_like_one_buffer(kept):
    keeper, plain = _keeper("ragged", kept=kept), _keeper("dense", kept=kept)
    rng = np.random.default_rng(1)
    assert len(keeper.widths(200)) == 3 and plain.widths(200) == [200] and sum(keeper.widths(1000)) == 1000
    columns = np.array([0, 66, 67, 199, 200, 133], np.int32)
    states = [each.empty(6, 2, 200, 4) for each in (keeper, plain)]
    for _ in range(3):
        new = rng.standard_normal((6, 2, 4), np.float32)
        states = [each.write(state, new, columns) for each, state in zip((keeper, plain), states, strict=True)]
        columns = columns + 1
    for length in (200, 90, 500):
        blocks, whole = (each.resize(x, length) for each, x in zip((keeper, plain), states, strict=True))
        assert [x.shape[2] for x in blocks] == keeper.widths(length)
        joined = jax.tree.map(lambda *x: np.concatenate(x, axis=2), *blocks)
        for got, want in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True):
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
    got = _attend(keeper, q, prompt, prompt_len, broken, np.full(6, 133, np.int32))
    assert np.isfinite(got).all()
    assert not np.isfinite(_attend(keeper, q, prompt, prompt_len, broken, np.full(6, 134, np.int32))).all()
