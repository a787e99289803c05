"""Advantages, rewards, critic, controllers and log-prob head against the slow references, float64 to 1e-9."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import algo

from . import reference as slow
from . import reference_loss as slow_loss
from .cases import FLOAT32, FLOAT64, GROUPS, REWARD_KINDS, assert_close, few, make_rewards, make_step, x64

SIMPLE = {
    "raw": slow.raw,
    "batch_mean": slow.batch_mean,
    "grpo": slow.grpo,
    "dr_grpo": slow.dr_grpo,
    "lite_ppo": slow.lite_ppo,
    "rloo": slow.rloo,
    "reinforce_pp": slow.reinforce_pp,
    "reinforce_pp_baseline": slow.reinforce_pp_baseline,
    "gpg": slow.gpg,
    "maxrl": slow.maxrl,
}
WITH_OPTIONS = {"remax", "opo", "pass_at_k", "gdpo"}


def test_every_estimator_has_a_reference():
    assert set(algo.ADVANTAGES) == set(SIMPLE) | WITH_OPTIONS


@cache
def compiled(name, fixed):
    """group_advantages as one program for a shape."""
    return jax.jit(partial(algo.group_advantages, estimator=name, **dict(fixed)))


def advantages(name, rewards, dtype=None, **options):
    """group_advantages in float64 (or dtype), its result as NumPy."""
    with x64():
        fixed = tuple((k, v) for k, v in options.items() if isinstance(v, int | float | str))
        arrays = {k: jnp.asarray(v) for k, v in options.items() if k not in dict(fixed)}
        out = compiled(name, fixed)(jnp.asarray(rewards, dtype or jnp.float64), **arrays)
        assert out.dtype == (jnp.float64 if dtype is None else jnp.float32)
        return np.asarray(out)


@pytest.mark.parametrize("name", SIMPLE)
@few(25)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(GROUPS), kind=st.sampled_from(REWARD_KINDS))
def test_advantages(name, seed, shape, kind):
    rewards, valid = make_rewards(seed, shape, kind)
    # A plain difference: of equal rewards the rounding of their own size is left, and not exactly 0.
    floor = max(0.01, 1e-6 * np.abs(rewards).max()) if name == "batch_mean" else 0.01
    assert_close(advantages(name, rewards, valid=valid), SIMPLE[name](rewards, valid), FLOAT64, floor)
    if shape == (3, 5):
        everyone = np.ones(shape, bool)
        assert_close(advantages(name, rewards), SIMPLE[name](rewards, everyone), FLOAT64, floor)


@few(25)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(5, 1), (3, 5)]),
    kind=st.sampled_from(REWARD_KINDS),
    ddof=st.sampled_from([0, 1]),
    eps=st.sampled_from([1e-4, 0.5]),
)
def test_advantages_with_ddof_and_eps(seed, shape, kind, ddof, eps):
    rewards, valid = make_rewards(seed, shape, kind)
    options = {"ddof": ddof, "eps": eps}
    for name in ("grpo", "lite_ppo"):
        expected = SIMPLE[name](rewards, valid, **options)
        assert_close(advantages(name, rewards, valid=valid, **options), expected, FLOAT64)
    assert_close(advantages("maxrl", rewards, valid=valid, eps=eps), slow.maxrl(rewards, valid, eps), FLOAT64)
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        expected = SIMPLE[name](rewards, valid, ddof=ddof)
        assert_close(advantages(name, rewards, valid=valid, ddof=ddof), expected, FLOAT64)


@few(25)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(GROUPS), kind=st.sampled_from(REWARD_KINDS))
def test_advantages_with_lengths(seed, shape, kind):
    rewards, valid = make_rewards(seed, shape, kind)
    lengths = np.random.default_rng(seed).integers(0, 9, shape) * (seed % 5 > 0)
    expected = slow.opo(rewards, valid, lengths)
    assert_close(advantages("opo", rewards, valid=valid, lengths=jnp.asarray(lengths)), expected, FLOAT64)


@few(25)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(GROUPS), kind=st.sampled_from(REWARD_KINDS))
def test_remax(seed, shape, kind):
    rewards, valid = make_rewards(seed, shape, kind)
    rng = np.random.default_rng(seed)
    greedy = np.where(rng.random(shape[0]) < 0.3, np.nan, rng.normal(size=shape[0]))
    with x64():
        got = advantages("remax", rewards, valid=valid, greedy=jnp.asarray(greedy))
    assert_close(got, slow.remax(rewards, valid, greedy), FLOAT64)


@few(60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 1), (3, 5)]),
    kind=st.sampled_from(REWARD_KINDS),
    data=st.data(),
)
def test_pass_at_k(seed, shape, kind, data):
    k = data.draw(st.integers(1, shape[1]))
    rewards, valid = make_rewards(seed, shape, kind)
    got = advantages("pass_at_k", rewards, valid=valid, k=k)
    assert_close(got, slow.pass_at_k(rewards, valid, k), FLOAT64)
    if kind == "binary":
        assert_close(got, slow.pass_at_k_binary(rewards, valid, k), FLOAT64)
    if k == 1:
        assert_close(got, slow.grpo(rewards, valid, ddof=0), FLOAT64)


@few(40)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 3, 5), (3, 2, 7)]),
    kind=st.sampled_from(REWARD_KINDS),
    ddof=st.sampled_from([0, 1]),
)
def test_gdpo(seed, shape, kind, ddof):
    rewards, valid = make_rewards(seed, shape, kind)
    weights = (1.0, -0.5, 0.3)[: shape[0]]
    with x64():
        got = advantages("gdpo", rewards, valid=valid, weights=jnp.asarray(weights), ddof=ddof)
    assert_close(got, slow.gdpo(rewards, valid, weights, ddof), FLOAT64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", sorted(SIMPLE))
@few(10)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(REWARD_KINDS))
def test_advantages_in_low_precision(name, dtype, seed, kind):
    """The arithmetic is float32 whatever comes in, so bfloat16 rewards give float32's accuracy on rounded rewards."""
    rewards, valid = make_rewards(seed, (3, 5), kind)
    rounded = np.asarray(rewards.astype(dtype), np.float64)
    got = advantages(name, rewards, dtype, valid=valid)
    assert_close(got, SIMPLE[name](rounded, valid), FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@few(10)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(REWARD_KINDS))
def test_advantages_with_options_in_low_precision(dtype, seed, kind):
    each, answered = make_rewards(seed, (2, 3, 5), kind)
    each = np.asarray(each.astype(dtype), np.float64)
    rewards, valid, greedy = each[0], answered[0], each[1, :, 0]
    lengths = np.random.default_rng(seed).integers(0, 9, (3, 5))
    weights = (1.0, 0.5)
    for name, given_rewards, there, options, expected in (
        ("remax", rewards, valid, {"greedy": jnp.asarray(greedy)}, slow.remax(rewards, valid, greedy)),
        ("opo", rewards, valid, {"lengths": jnp.asarray(lengths)}, slow.opo(rewards, valid, lengths)),
        ("pass_at_k", rewards, valid, {"k": 2}, slow.pass_at_k(rewards, valid, 2)),
        ("gdpo", each, answered, {"weights": jnp.asarray(weights)}, slow.gdpo(each, answered, weights)),
    ):
        assert_close(advantages(name, given_rewards, dtype, valid=there, **options), expected, FLOAT32)


# Rewards.


@few(25)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 3, 5), (3, 2, 7)]), kind=st.sampled_from(REWARD_KINDS))
def test_combine_rewards(seed, shape, kind):
    rewards, valid = make_rewards(seed, shape, kind)
    weights = np.array([1.0, -0.5, 0.3])[: shape[0]]
    with x64():
        reward, answered = algo.combine_rewards(jnp.asarray(rewards), jnp.asarray(weights), jnp.asarray(valid))
        nans, same = algo.combine_rewards(jnp.asarray(np.where(valid, rewards, np.nan)), jnp.asarray(weights))
        expected = slow.combine_rewards(rewards, weights, valid)
    assert_close(reward, expected[0], FLOAT64)
    np.testing.assert_array_equal(answered, expected[1])
    np.testing.assert_array_equal(reward, nans)
    np.testing.assert_array_equal(answered, same)


@few(25)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from(GROUPS), kind=st.sampled_from(REWARD_KINDS))
def test_has_spread(seed, shape, kind):
    rewards, valid = make_rewards(seed, shape, kind)
    expected = [slow.has_spread(slow.scored(r, v)[1]) for r, v in zip(rewards, valid, strict=True)]
    with x64():
        got = algo.has_spread(jnp.asarray(rewards), jnp.asarray(valid))
    np.testing.assert_array_equal(got, expected)


@few(25)
@given(seed=st.integers(0, 2**31), ddof=st.sampled_from([0, 1]), weighted=st.booleans(), constant=st.booleans())
def test_whiten(seed, ddof, weighted, constant):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(3, 5)), rng.random((3, 5)) < rng.choice([0.0, 0.1, 0.8])
    x = np.full((3, 5), 0.1) if constant else x
    tokens = rng.integers(1, 9, (3, 5)).astype(float) if weighted else None
    with x64():
        counts = None if tokens is None else jnp.asarray(tokens)
        got = np.asarray(algo.whiten(jnp.asarray(x), jnp.asarray(mask), weights=counts, ddof=ddof))
    expected = np.zeros((3, 5))
    expected[mask] = slow.whiten(list(x[mask]), ddof, None if tokens is None else list(tokens[mask]))
    assert_close(got, expected, FLOAT64)


@few(25)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(REWARD_KINDS), ddof=st.sampled_from([0, 1]))
def test_whitening_by_tokens(seed, kind, ddof):
    rewards, valid = make_rewards(seed, (3, 5), kind)
    lengths = np.random.default_rng(seed).integers(1, 9, (3, 5))
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        options = {"valid": valid, "lengths": jnp.asarray(lengths), "weights": "tokens", "ddof": ddof}
        expected = SIMPLE[name](rewards, valid, lengths=lengths, ddof=ddof)
        assert_close(advantages(name, rewards, **options), expected, FLOAT64)


def test_clip_symmetric():
    x = np.array([-1e30, -2.0, -0.5, 0.0, 0.3, 0.5, 7.0, 1e30])
    for limit in (0.5, 2.0):
        assert_close(algo.clip_symmetric(jnp.asarray(x), limit), [min(max(v, -limit), limit) for v in x], FLOAT32)
    np.testing.assert_array_equal(algo.clip_symmetric(jnp.asarray(x), None), x.astype(np.float32))


@pytest.mark.parametrize(("longest", "buffer", "factor"), [(20, None, 1.0), (17, 5, 0.5), (7, 7, 2.0), (16, 0.5, 1.0)])
def test_soft_overlong(longest, buffer, factor):
    lengths = np.arange(0, longest + 4)
    expected = [slow.soft_overlong(n, longest, longest / 5 if buffer is None else buffer, factor) for n in lengths]
    assert_close(algo.soft_overlong(jnp.asarray(lengths), longest, buffer, factor), expected, 1e-6)


def test_overlong_filter():
    mask = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]], bool)
    got = algo.overlong_filter(jnp.asarray(mask), jnp.array([True, False, True]))
    np.testing.assert_array_equal(got, [[0, 0, 0], [0, 1, 1], [0, 0, 0]])
    cut = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 1]], bool)
    np.testing.assert_array_equal(algo.overlong_filter(jnp.asarray(mask), jnp.asarray(cut)), mask & ~cut)


@pytest.mark.parametrize("grouped", [False, True])
def test_kl_in_reward(grouped):
    step = make_step(3, (6, 7), drift=0.5)
    rewards = np.arange(6.0)
    expected = [
        slow.kl_in_reward(row[0], 0.05, *row[1:])
        for row in zip(rewards, step.old_logp, step.ref_logp, step.mask, strict=True)
    ]
    with x64():
        shaped = jnp.asarray(rewards.reshape(2, 3) if grouped else rewards)
        old, ref, mask = map(jnp.asarray, (step.old_logp, step.ref_logp, step.mask))
        got = algo.kl_in_reward(shaped, old, ref, mask, 0.05)
        slope = jax.grad(lambda x: algo.kl_in_reward(shaped, x, ref, mask, 0.05).sum())(old)
    assert got.shape == shaped.shape
    assert_close(got.reshape(-1), expected, FLOAT64)
    assert (np.asarray(slope) == 0).all()


# Critic.


jit_gae = jax.jit(algo.gae, static_argnames=("gamma", "lam"))
value_and_slope = jax.jit(
    jax.value_and_grad(lambda v, old, returns, mask, clip: algo.value_loss(v, old, returns, mask, clip=clip)[0]),
    static_argnums=4,
)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
@few(20)
@given(seed=st.integers(0, 2**31), packed=st.booleans(), pay=st.booleans())
def test_gae(gamma, lam, seed, packed, pay):
    shape = (5, 7)
    step = make_step(seed, shape, packed=packed)
    rng = np.random.default_rng(seed)
    rewards = np.where(rng.random((shape[0], 4)) < 0.2, np.nan, rng.normal(size=(shape[0], 4)))
    values, penalty = rng.normal(size=shape), rng.normal(size=shape) if pay else None
    ids = np.zeros(shape, int) if step.segments is None else step.segments
    per_token = np.take_along_axis(rewards, ids, 1)
    with x64():
        got = jit_gae(
            jnp.asarray(per_token if packed else rewards[:, 0]),
            jnp.asarray(values),
            jnp.asarray(step.mask),
            gamma=gamma,
            lam=lam,
            penalty=None if penalty is None else jnp.asarray(penalty),
            segments=None if step.segments is None else jnp.asarray(step.segments),
        )
    expected = np.zeros((2, *shape))
    for n in range(shape[0]):
        for i in np.unique(ids[n]):
            inside = step.mask[n] & (ids[n] == i)
            if not np.isnan(rewards[n, i]):
                pay_row = None if penalty is None else penalty[n]
                expected[:, n] += slow.gae(rewards[n, i], values[n], inside, gamma, lam, pay_row)
    assert_close(got[0], expected[0], FLOAT64)
    assert_close(got[1], expected[1], FLOAT64)


@pytest.mark.parametrize("clip", [None, 0.2, 0.0])
@few(20)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 1), (5, 7)]), masked=st.sampled_from(["random", "all"]))
def test_value_loss(clip, seed, shape, masked):
    rng = np.random.default_rng(seed)
    mask = make_step(seed, shape, masked=masked).mask
    values, returns = rng.normal(size=shape), rng.normal(size=shape)
    old = values + 0.3 * rng.normal(size=shape)
    with x64():
        arrays = [jnp.asarray(x) for x in (old, returns, mask)]
        value, grad = value_and_slope(jnp.asarray(values), *arrays, clip)
    expected = slow.value_loss(values, old, returns, mask, clip)
    assert_close(value, expected[0], FLOAT64)
    assert_close(grad, expected[1], FLOAT64)


# Controllers.


@few(25)
@given(kl=st.floats(-1.0, 20.0), coef=st.floats(0.0, 2.0), completions=st.integers(0, 1000))
def test_adaptive_kl(kl, coef, completions):
    with x64():
        got = algo.adaptive_kl(jnp.float64(coef), kl, target=6.0, horizon=10_000.0, completions=completions)
    assert_close(got, slow.adaptive_kl(coef, kl, 6.0, 10_000.0, completions), FLOAT64)


def test_adaptive_entropy():
    """A path across the target, with both limits hit."""
    with x64():
        state = algo.EntropyController(coef=jnp.float64(0.006), active=jnp.asarray(False))
        expected = (0.006, False)
        for entropy in [0.3, 0.25, 0.3, 0.2, 0.1, 0.1, 0.1, 0.21, 0.0]:
            state = algo.adaptive_entropy(state, jnp.float64(entropy), high=0.0175)
            expected = slow.adaptive_entropy(expected[0], entropy, high=0.0175)
            assert_close(state.coef, expected[0], FLOAT64)
            assert bool(state.active) == expected[1]


def test_follow_reference():
    reference, policy = {"a": np.arange(3.0), "b": np.ones((2, 2))}, {"a": -np.ones(3), "b": np.full((2, 2), 3.0)}
    with x64():
        trees = [jax.tree.map(jnp.asarray, t) for t in (reference, policy)]
        for step in range(9):
            got = algo.follow_reference(*trees, step, alpha=0.25, every=4)
            share = 0.25 if step in (4, 8) else 0.0
            for name in reference:
                assert_close(got[name], share * policy[name] + (1 - share) * reference[name], FLOAT64)


# Log-prob head.


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ({}, {"token_chunk": 2, "vocab_chunk": 3}),
        ({"temperature": 0.7, "softcap": 1.5, "logit_scale": 0.5}, {"token_chunk": 3, "vocab_chunk": 4}),
        ({"temperature": 2.0, "softcap": 30.0}, {}),
    ],
)
def test_logprobs_and_entropy(options, chunks):
    """Values, and the gradient of a weighted sum of both results in hidden states and unembedding."""
    rng = np.random.default_rng(7)
    hidden, unembed, targets = rng.normal(size=(5, 3)), rng.normal(size=(3, 7)), rng.integers(0, 7, 5)
    parts = rng.normal(size=(2, 5))
    logps, entropies = slow_loss.head(hidden, unembed, targets, **options)
    expected = slow_loss.total(w * x for w, x in zip(parts.reshape(-1), logps + entropies, strict=True))
    with x64():

        def weighted(h, u):
            out = algo.logprobs.logprobs_and_entropy(h, u, jnp.asarray(targets), **options, **chunks)
            return sum(jnp.sum(jnp.asarray(w) * x) for w, x in zip(parts, out, strict=True)), out

        grads, got = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(hidden, unembed)
    for g, e in zip(got, (logps, entropies), strict=True):
        assert_close(g, [x.v for x in e], FLOAT64)
    assert_close(np.concatenate([np.asarray(g).reshape(-1) for g in grads]), expected.g, FLOAT64)
