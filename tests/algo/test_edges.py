"""Every edge that docs/MATH.md section 1 and contract 7 of docs/DESIGN.md name, each by its name."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but

from grpo_jax import algo

from . import reference as slow
from .cases import x64

OPTIONS = {
    "remax": lambda q, g: {"greedy": jnp.zeros(q)},
    "opo": lambda q, g: {"lengths": jnp.arange(1, q * g + 1).reshape(q, g)},
    "pass_at_k": lambda q, g: {"k": min(2, g)},
    "gdpo": lambda q, g: {"weights": jnp.array([1.0, 0.5])},
}
OWN_FORMULA_ALONE = {"raw", "batch_mean", "reinforce_pp", "remax"}
"""Those whose advantage of a single scored sample is their formula's; all others give 0."""
NOT_BY_GROUP = {"raw", "remax", "batch_mean", "reinforce_pp"}
"""Those that do not normalise by group: a group without spread is nothing special to them."""


def estimate(name, rewards, valid=None, dtype=jnp.float32, **over):
    """group_advantages of [Q, G] rewards with the options the estimator needs; gdpo gets two equal functions."""
    rewards = jnp.asarray(rewards, dtype)
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid)
    return np.asarray(_estimate_jit(name, rewards, valid, **over), np.float64)


def _estimate(name, rewards, valid, **over):
    options = {**OPTIONS.get(name, lambda q, g: {})(*rewards.shape), **over}
    if name == "gdpo":
        rewards, valid = jnp.stack([rewards] * 2), jnp.stack([valid] * 2)
    return algo.group_advantages(rewards, estimator=name, valid=valid, **options)


_estimate_jit = jax.jit(_estimate, static_argnums=0, static_argnames=("k", "eps"))
"""One program for an estimator and a shape: most tests below give [3, 5]."""


group_advantages = jax.jit(algo.group_advantages, static_argnames="estimator")
gae = jax.jit(algo.gae, static_argnames=("gamma", "lam"))
whiten = jax.jit(algo.whiten, static_argnames="ddof")


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=1)
def slope_of(name, rewards, valid):
    """The gradient of a scalar of the advantages in the rewards."""
    out = _estimate(name, rewards, valid)
    return jnp.sum(out * jnp.arange(1.0, out.size + 1).reshape(out.shape))


all_estimators = pytest.mark.parametrize("name", sorted(algo.ADVANTAGES))
by_group = pytest.mark.parametrize("name", sorted(set(algo.ADVANTAGES) - NOT_BY_GROUP))


@pytest.mark.parametrize("dtype", slow_but([jnp.float32, jnp.float16], [jnp.float32, jnp.bfloat16, jnp.float16]))
@by_group
def test_equal_rewards_give_exactly_zero(name, dtype):
    # In whatever order five times 0.013 are summed in float32, a fifth of it is not 0.013; of 0.1 it is.
    mixed = np.array([[0.013] * 5, [0.0, 1.0, 0.0, 1.0, 1.0], [1e30 if dtype == jnp.float32 else 1e4] * 5])
    out = estimate(name, mixed, dtype=dtype)
    assert (out[0] == 0).all() and (out[2] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("value", [0.1, -0.3, 1e30, 1 / 3])
@pytest.mark.parametrize("name", sorted(set(algo.ADVANTAGES) - {"raw", "remax"}))
def test_a_batch_of_equal_rewards_gives_zero(name, value):
    out = estimate(name, np.full((3, 5), value))
    if name == "batch_mean":  # a plain difference: no select is promised, only that nothing is divided by it
        assert np.abs(out).max() <= 1e-6 * abs(value)
    else:
        assert (out == 0).all()


@by_group
def test_equal_valid_rewards_give_exactly_zero_whatever_the_others_hold(name):
    rewards = np.array([[0.1, 0.1, 7.0, 0.1, np.nan], [0.0, 1.0, 1.0, 0.0, 1.0], [np.inf, 3.0, 3.0, -9.0, 3.0]])
    valid = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
    out = estimate(name, rewards, valid)
    assert (out[[0, 2]] == 0).all() and (out[1] != 0).any()


@all_estimators
def test_huge_rewards_stay_finite(name):
    low = 0.0 if name == "maxrl" else -1e30
    rewards = np.array([[low, 1e30, 1e30, low, 1e30], [1e30, low, low, low, 0.0], [1.0, 2.0, 0.5, 3.0, 4.0]])
    out = estimate(name, rewards)
    assert np.isfinite(out).all() and (out[:2] != 0).any()
    with x64():
        exact = estimate(name, rewards, dtype=jnp.float64)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "gdpo", "pass_at_k"])
def test_huge_rewards_are_normalised_as_small_ones_are(name):
    pattern = np.array([[-1.0, 1.0, 1.0, -1.0, 1.0], [1.0, -1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 1.0, 1.0]])
    huge = estimate(name, pattern * 1e30)
    np.testing.assert_allclose(huge, estimate(name, pattern), rtol=3e-4)  # eps = 1e-4 is all that differs


@all_estimators
def test_nan_rewards_that_are_not_valid_leak_nowhere(name):
    rewards = np.array(
        [[1.0, 0.0, np.nan, 0.0, 0.0], [np.nan, 2.0, 0.0, np.inf, 0.0], [-np.inf, 1.0, 2.0, 3.0, np.nan]]
    )
    valid = np.isfinite(rewards)
    out = estimate(name, rewards, valid)
    assert np.isfinite(out).all()
    assert (out[~valid] == 0).all() and (out[valid] != 0).any()
    np.testing.assert_array_equal(out, estimate(name, np.where(valid, rewards, -5.0), valid))
    slope = np.asarray(slope_of(name, jnp.asarray(rewards, jnp.float32), valid))
    assert np.isfinite(slope[valid]).all() and (slope[~valid] == 0).all()


@all_estimators
def test_fewer_than_two_scored_samples(name):
    rewards = np.array([[3.0, 9.0, 9.0, 9.0, 9.0], [0.0, 1.0, 2.0, 9.0, 9.0], [9.0] * 5])
    valid = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0] * 5], bool)
    out = estimate(name, rewards, valid)
    assert np.isfinite(out).all()
    assert (out[0, 1:] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()
    assert (out[0, 0] != 0) == (name in OWN_FORMULA_ALONE)


@all_estimators
def test_groups_of_one(name):
    rewards = np.array([[1.0], [0.0], [3.0]])
    expected = {
        "raw": rewards,
        "remax": rewards,
        "batch_mean": rewards - 4 / 3,
        "reinforce_pp": slow.reinforce_pp(rewards, np.ones((3, 1), bool)),
    }
    np.testing.assert_allclose(estimate(name, rewards), expected.get(name, np.zeros((3, 1))), rtol=1e-6)


@all_estimators
def test_one_sample_in_all(name):
    out = estimate(name, np.array([[2.0]]))
    np.testing.assert_array_equal(out, [[2.0]] if name in ("raw", "remax") else [[0.0]])


@all_estimators
def test_nothing_scored(name):
    out = estimate(name, np.full((3, 5), np.nan), np.zeros((3, 5), bool))
    np.testing.assert_array_equal(out, np.zeros((3, 5)))


def test_maxrl_where_the_mean_is_at_most_eps():
    rewards = np.array([[0.0, 0.0, 2e-4, 0.0], [1e-4, 0.0, 0.0, 1e-4], [0.0, 1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, -1.0]])
    out = estimate("maxrl", rewards)
    assert (out[[0, 1, 3]] == 0).all()
    np.testing.assert_allclose(out[2], [-1.0, 3.0, -1.0, -1.0], rtol=1e-6)
    np.testing.assert_allclose(estimate("maxrl", rewards, eps=1e-6)[0], [-1.0, -1.0, 3.0, -1.0], rtol=1e-6)


def test_opo_without_any_token_takes_the_mean():
    rewards = np.array([[1.0, 2.0, 6.0], [1.0, 2.0, 6.0]])
    lengths = jnp.array([[0, 0, 0], [0, 3, 1]])
    out = estimate("opo", rewards, lengths=lengths)
    np.testing.assert_allclose(out, [[-2.0, -1.0, 3.0], [-2.0, -1.0, 3.0]], rtol=1e-6)
    unequal = estimate("opo", rewards, lengths=jnp.array([[0, 0, 0], [1, 0, 3]]))
    np.testing.assert_allclose(unequal[1], [1 - 19 / 4, 2 - 19 / 4, 6 - 19 / 4], rtol=1e-6)
    assert abs((unequal[1] * [1, 0, 3]).sum()) < 1e-5


def test_gpg_counts_the_scored_samples_of_groups_with_spread():
    """Eight samples scored, three of them in the one group with spread; a zero reward is a sample like any other."""
    rewards = np.array([[0.0, 1.0, 0.0, np.nan], [1.0, 1.0, 1.0, 1.0], [5.0, np.nan, np.nan, np.nan]])
    out = estimate("gpg", rewards, np.isfinite(rewards))
    np.testing.assert_allclose(out[0], np.array([-1 / 3, 2 / 3, -1 / 3, 0.0]) * 8 / 3, rtol=1e-6)
    assert (out[1:] == 0).all()


def test_remax_without_a_greedy_reward_gives_the_group_zero():
    out = estimate("remax", np.array([[1.0, 2.0], [1.0, 2.0]]), greedy=jnp.array([np.nan, 0.5]))
    np.testing.assert_array_equal(out, [[0.0, 0.0], [0.5, 1.5]])


def test_pass_at_k_where_every_best_is_the_same():
    """Two wrong samples and k = 3: every three hold a right one, so nothing is to be learned."""
    thirds = np.array([[0.1, 0.7, 0.7, 0.0, 0.7], [0.0, 0.0, 0.0, 0.0, 0.7]])
    out = estimate("pass_at_k", thirds, k=3)
    assert (out[0] == 0).all() and (out[1] != 0).all()
    assert (estimate("pass_at_k", thirds, k=5) == 0).all()


def test_pass_at_k_in_a_group_smaller_than_k():
    rewards = np.array([[0.0, 1.0, np.nan, np.nan, np.nan], [0.0, 1.0, 0.0, np.nan, np.nan]])
    out = estimate("pass_at_k", rewards, np.isfinite(rewards), k=3)
    assert (out[0] == 0).all()
    out = estimate("pass_at_k", rewards, np.isfinite(rewards), k=2)
    assert (out[0] == 0).all() and (out[1, :3] != 0).all() and (out[1, 3:] == 0).all()


def test_rewards_one_rounding_apart_are_spread():
    close = np.full((2, 4), np.float32(0.1))
    close[0, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    np.testing.assert_array_equal(algo.has_spread(jnp.asarray(close, jnp.float32)), [True, False])
    out = estimate("grpo", close)
    assert np.isfinite(out).all() and np.abs(out[0]).max() < 1e-3 and (out[1] == 0).all()


def test_gdpo_selects_each_function_and_the_sum():
    """Two functions whose parts cancel leave a sum without spread; one that is constant adds nothing."""
    r = np.array([[0.0, 1.0, 0.0, 0.3], [1.0, 1.0, 0.0, 0.0]])
    weights = np.array([1.0, 1.0])

    def gdpo(*functions):
        return np.asarray(group_advantages(np.asarray(functions), estimator="gdpo", weights=weights))

    assert (gdpo(r, -r) == 0).all()
    np.testing.assert_array_equal(gdpo(r, np.full((2, 4), 0.1)), gdpo(np.full((2, 4), 0.7), r))
    flat = np.array([[0.1, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    assert (gdpo(flat, flat)[0] == 0).all() and (gdpo(flat, flat)[1] != 0).all()


def test_a_function_that_did_not_answer_is_out_of_its_statistics():
    first = np.array([[0.0, 1.0, np.nan, 1.0], [1.0, 0.0, 1.0, 0.0]])
    second = np.array([[np.nan, np.nan, 2.0, 5.0], [np.nan, np.nan, np.nan, np.nan]])
    weights = np.array([1.0, 0.5])
    rewards, answered = np.stack([first, second]), np.isfinite(np.stack([first, second]))
    expected = slow.gdpo(rewards, answered, weights)
    out = group_advantages(rewards, estimator="gdpo", weights=weights)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(expected).all() and expected[0, 2] != 0


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_one_value_or_none(ddof):
    x, mask = jnp.array([3.0, jnp.nan, 7.0]), np.array([True, False, False])
    np.testing.assert_array_equal(whiten(x, jnp.asarray(mask), ddof=ddof), [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(whiten(x, jnp.zeros(3, bool), ddof=ddof), [0.0, 0.0, 0.0])
    assert (np.asarray(whiten(jnp.full((5, 7), 0.1), ddof=ddof)) == 0).all()


def test_whitening_huge_values():
    x = jnp.array([1e30, -1e30, 1e30, 0.0])
    np.testing.assert_allclose(whiten(x), slow.whiten([1.0, -1.0, 1.0, 0.0]), rtol=1e-5)


def test_no_answer_at_all_is_not_scored():
    rewards = jnp.array([[[1.0, jnp.nan, jnp.nan]], [[jnp.nan, 2.0, jnp.nan]]])
    reward, answered = algo.combine_rewards(rewards, jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(reward, [[0.5, 4.0, 0.0]])
    np.testing.assert_array_equal(answered, [[True, True, False]])


def test_soft_overlong_at_its_corners():
    """Lengths with the stop token: free up to L_max - L_buf, -1 at L_max already, never below."""
    out = algo.soft_overlong(jnp.array([0, 16, 17, 19, 20, 21, 1000]), 20)
    np.testing.assert_allclose(out, [0.0, 0.0, -0.25, -0.75, -1.0, -1.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(algo.soft_overlong(jnp.array([0, 5, 20]), 20, 20), [0.0, -0.25, -1.0], atol=1e-6)
    for buffer in (0, -1, 21):
        with pytest.raises(ValueError, match="buffer"):
            algo.soft_overlong(jnp.array([1]), 20, buffer)


def test_kl_in_reward_reads_nothing_that_is_masked():
    logp, ref = jnp.array([[-1.0, jnp.nan], [jnp.nan, jnp.inf]]), jnp.array([[-1.5, 0.0], [0.0, jnp.nan]])
    mask = jnp.array([[True, False], [False, False]])
    np.testing.assert_allclose(algo.kl_in_reward(jnp.array([2.0, 3.0]), logp, ref, mask, 0.1), [1.95, 3.0], rtol=1e-6)


def test_gae_skips_what_is_not_completion():
    """Holes, prompt and padding hold NaN; the recursion goes on across them as if the row were shorter."""
    nan = np.nan
    values = jnp.array([[nan, 0.5, nan, 0.2, -0.3, nan], [0.5, 0.2, -0.3, nan, nan, nan]])
    completion = jnp.array([[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
    adv, ret = gae(jnp.array([1.0, 1.0]), values, completion, gamma=0.9, lam=0.8)
    expected, _ = slow.gae(1.0, [0.5, 0.2, -0.3], [True] * 3, 0.9, 0.8)
    np.testing.assert_allclose(adv[0], [0, expected[0], 0, expected[1], expected[2], 0], rtol=1e-5)
    np.testing.assert_allclose(adv[1, :3], expected, rtol=1e-5)
    assert (np.asarray(adv)[~completion] == 0).all() and (np.asarray(ret)[~completion] == 0).all()


def test_gae_of_rows_unscored_or_empty():
    values, completion = jnp.ones((3, 4)), jnp.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    for rewards, scored in (
        (jnp.array([jnp.nan, 1.0, 2.0]), None),
        (jnp.array([5.0, 1.0, 2.0]), jnp.array([False, True, True])),
    ):
        adv, ret = gae(rewards, values, completion, scored=scored)
        assert (np.asarray(adv)[:2] == 0).all() and (np.asarray(ret)[:2] == 0).all()
        assert np.isfinite(adv).all() and (np.asarray(adv)[2, :2] != 0).all()


def test_gae_of_one_token():
    adv, ret = gae(jnp.array([2.0]), jnp.array([[0.5]]), jnp.ones((1, 1), bool))
    assert (float(adv[0, 0]), float(ret[0, 0])) == (1.5, 2.0)


def test_value_loss_reads_nothing_that_is_masked():
    mask = np.array([[True, False], [False, False]])
    bad = np.array([[1.0, np.nan], [np.inf, np.nan]], np.float32)
    loss = jax.jit(jax.value_and_grad(lambda v, returns, mask: algo.value_loss(v, bad, returns, mask)[0]))
    value, slope = loss(bad, bad + 1.0, mask)
    assert float(value) == 0.5
    np.testing.assert_array_equal(slope, [[-1.0, 0.0], [0.0, 0.0]])
    value, slope = loss(bad, bad, np.zeros((2, 2), bool))
    assert float(value) == 0 and (np.asarray(slope) == 0).all()


def test_adaptive_controllers_at_their_limits():
    """The error is clipped to a fifth both ways; an entropy at the target counts as below it."""
    move = lambda kl: float(algo.adaptive_kl(1.0, kl, target=2.0, horizon=100.0, completions=10))  # noqa: E731
    np.testing.assert_allclose([move(k) for k in (0.0, 1.6, 2.0, 2.4, 1e30)], [0.98, 0.98, 1.0, 1.02, 1.02], rtol=1e-6)
    start = algo.EntropyController(coef=jnp.float32(0.0), active=jnp.asarray(False))
    up = algo.adaptive_entropy(start, 0.2)
    assert bool(up.active) and float(up.coef) == np.float32(0.005)
    down = algo.adaptive_entropy(start, 0.2001)
    assert not bool(down.active) and float(down.coef) == 0.0
