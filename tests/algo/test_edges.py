"""Every edge that docs/MATH.md section 1 and contract 7 of docs/DESIGN.md name, each by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    options = {**OPTIONS.get(name, lambda q, g: {})(*rewards.shape), **over}
    if valid is not None:
        options["valid"] = jnp.asarray(valid)
    if name == "gdpo":
        rewards = jnp.stack([rewards, rewards])
        if valid is not None:
            options["valid"] = jnp.stack([options["valid"]] * 2)
    out = algo.group_advantages(rewards, estimator=name, **options)
    return np.asarray(out, np.float64)


all_estimators = pytest.mark.parametrize("name", sorted(algo.ADVANTAGES))
by_group = pytest.mark.parametrize("name", sorted(set(algo.ADVANTAGES) - NOT_BY_GROUP))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@by_group
def test_equal_rewards_give_exactly_zero(name, dtype):
    mixed = np.array([[0.1] * 8, [0.0, 1.0] * 4, [1e30 if dtype == jnp.float32 else 1e4] * 8])
    out = estimate(name, mixed, dtype=dtype)
    assert (out[0] == 0).all() and (out[2] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("value", [0.1, -0.3, 1e30, 1 / 3])
@pytest.mark.parametrize("name", sorted(set(algo.ADVANTAGES) - {"raw", "remax"}))
def test_a_batch_of_equal_rewards_gives_zero(name, value):
    out = estimate(name, np.full((3, 8), value))
    if name == "batch_mean":  # a plain difference: no select is promised, only that nothing is divided by it
        assert np.abs(out).max() <= 1e-6 * abs(value)
    else:
        assert (out == 0).all()


@by_group
def test_equal_valid_rewards_give_exactly_zero_whatever_the_others_hold(name):
    rewards = np.array([[0.1, 0.1, 7.0, 0.1, np.nan], [0.0, 1.0, 1.0, 0.0, 1.0]])
    valid = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], bool)
    out = estimate(name, rewards, valid)
    assert (out[0] == 0).all() and (out[1] != 0).any()


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
    rewards = np.array([[1.0, 0.0, np.nan, 0.0], [np.nan, 2.0, 0.0, np.inf]])
    valid = np.isfinite(rewards)
    out = estimate(name, rewards, valid)
    assert np.isfinite(out).all()
    assert (out[~valid] == 0).all() and (out[valid] != 0).any()
    np.testing.assert_array_equal(out, estimate(name, np.where(valid, rewards, -5.0), valid))
    slope = jax.grad(lambda r: _weighted(name, r, valid))(jnp.asarray(rewards, jnp.float32))
    assert np.isfinite(np.asarray(slope)[valid]).all() and (np.asarray(slope)[~valid] == 0).all()


def _weighted(name, rewards, valid):
    """A scalar of the advantages to differentiate."""
    options = OPTIONS.get(name, lambda q, g: {})(*rewards.shape)
    if name == "gdpo":
        rewards, valid = jnp.stack([rewards] * 2), np.stack([valid] * 2)
    out = algo.group_advantages(rewards, estimator=name, valid=jnp.asarray(valid), **options)
    return jnp.sum(out * jnp.arange(1.0, out.size + 1).reshape(out.shape))


@all_estimators
def test_fewer_than_two_scored_samples(name):
    rewards = np.array([[3.0, 9.0, 9.0], [0.0, 1.0, 2.0], [9.0, 9.0, 9.0]])
    valid = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
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
