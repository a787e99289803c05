"""What holds for every row of every table, so that a new row is tested by being a row (STYLE.md).

Here the tables themselves, the advantages and the KL estimators; test_properties_loss.py has the losses.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo
from grpo_jax.algo import spec
from grpo_jax.algo.ratios import RATIOS
from grpo_jax.algo.refusals import RATIO_LEVELS

TABLES = {
    "ADVANTAGES": (algo.ADVANTAGES, spec.Estimator),
    "SURROGATES": (algo.SURROGATES, spec.Surrogate),
    "KL_ESTIMATORS": (algo.KL_ESTIMATORS, spec.KLEstimator),
    "AGGREGATIONS": (algo.AGGREGATIONS, spec.Aggregation),
    "CORRECTIONS": (algo.CORRECTIONS, spec.Correction),
    "PRESETS": (algo.PRESETS, spec.Preset),
    "RATIOS": (RATIOS, spec.RatioLevel),
    "RATIO_LEVELS": (RATIO_LEVELS, spec.Surrogate),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_keys_of_its_literal(name):
    table, literal = TABLES[name]
    assert list(table) == list(get_args(literal))


# Advantages.

SUM_IS_FREE = {"raw", "batch_mean", "reinforce_pp", "remax", "opo"}
SHIFT_IS_SEEN = {"raw", "remax", "maxrl"}
SHIFT_OF_BATCH_ONLY = {"batch_mean", "lite_ppo", "reinforce_pp"}
estimators = pytest.mark.parametrize("name", algo.ADVANTAGES)


def rewards_for(name, groups=3, size=7):
    """Rewards in eighths, some samples missing; for gdpo two functions."""
    rng = np.random.default_rng(3)
    shape = (2, groups, size) if name == "gdpo" else (groups, size)
    valid = np.ones((groups, size), bool)
    valid[0, 2] = valid[1, 5] = valid[1, 6] = False
    return rng.integers(0, 9, shape) / 8.0, valid, rng.integers(1, 50, (groups, size)), rng.integers(0, 9, groups) / 8.0


def estimate(name, rewards, valid, lengths, greedy):
    options = {
        "lengths": lengths,
        "greedy": greedy,
        "k": 2,
        "weights": np.array([1.0, 0.5]) if name == "gdpo" else None,
    }
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    return np.asarray(algo.group_advantages(jnp.asarray(rewards), estimator=name, valid=jnp.asarray(valid), **options))


@estimators
def test_groups_sum_to_zero(name):
    rewards, valid, lengths, greedy = rewards_for(name)
    out = estimate(name, rewards, valid, lengths, greedy)
    assert np.abs(out).max() > 0.1 and (out[~valid] == 0).all()
    sums = np.abs(out.sum(-1))
    if name == "opo":
        sums = np.abs((out * lengths * valid).sum(-1)) / 50
    assert (sums.max() > 1e-3) if name in SUM_IS_FREE - {"opo"} else (sums.max() < 1e-5)


@estimators
def test_a_constant_added_to_a_group_changes_nothing(name):
    rewards, valid, lengths, greedy = rewards_for(name)
    out = estimate(name, rewards, valid, lengths, greedy)
    everywhere = estimate(name, rewards + 2.0, valid, lengths, greedy)
    one = rewards.copy()
    one[..., 1, :] += 2.0
    once = estimate(name, one, valid, lengths, greedy)
    for shifted, seen in (
        (everywhere, name in SHIFT_IS_SEEN),
        (once, name in SHIFT_IS_SEEN | SHIFT_OF_BATCH_ONLY),
    ):
        gap = np.abs(shifted - out).max()
        assert (gap > 1e-3) if seen else (gap < 1e-5)


@estimators
def test_permuting_samples_and_groups_permutes_advantages(name):
    rewards, valid, lengths, greedy = rewards_for(name)
    rng = np.random.default_rng(0)
    samples, groups = rng.permutation(7), rng.permutation(3)
    out = estimate(name, rewards, valid, lengths, greedy)
    mixed = estimate(
        name,
        rewards[..., groups, :][..., samples],
        valid[groups][:, samples],
        lengths[groups][:, samples],
        greedy[groups],
    )
    np.testing.assert_allclose(mixed, out[groups][:, samples], rtol=0, atol=2e-6)


@estimators
def test_a_missing_sample_is_as_if_it_were_not_there(name):
    rewards, _, lengths, greedy = rewards_for(name)
    valid = np.ones((3, 7), bool)
    valid[:, 5:] = False
    out = estimate(name, np.where(valid, rewards, np.nan), valid, lengths, greedy)
    short = estimate(name, rewards[..., :5], valid[:, :5], lengths[:, :5], greedy)
    np.testing.assert_allclose(out[:, :5], short, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out[:, 5:], 0)


def test_advantages_that_reduce_to_one_another():
    rewards, valid, lengths, greedy = rewards_for("grpo")
    count = valid.sum(-1, keepdims=True)
    of = functools.partial(estimate, rewards=rewards, valid=valid, lengths=lengths, greedy=greedy)
    centred = of("dr_grpo")
    np.testing.assert_allclose(of("rloo"), centred * count / (count - 1), rtol=1e-6)
    others = (np.where(valid, rewards, 0).sum(-1, keepdims=True) - rewards) / (count - 1)
    np.testing.assert_allclose(of("rloo"), np.where(valid, rewards - others, 0), rtol=0, atol=1e-6)
    first = algo.group_advantages(jnp.asarray(rewards), estimator="pass_at_k", k=1, valid=jnp.asarray(valid))
    plain = algo.group_advantages(jnp.asarray(rewards), ddof=0, valid=jnp.asarray(valid))
    np.testing.assert_allclose(first, plain, rtol=0, atol=2e-6)
    np.testing.assert_allclose(estimate("opo", rewards, valid, np.full_like(lengths, 9), greedy), centred, atol=1e-6)
    np.testing.assert_allclose(of("gpg"), centred, atol=1e-6)
    flat = np.concatenate([rewards, np.ones((1, 7))])
    there = np.concatenate([valid, np.ones((1, 7), bool)])
    scaled = algo.group_advantages(jnp.asarray(flat), estimator="gpg", valid=jnp.asarray(there))
    np.testing.assert_allclose(scaled[:3], centred * there.sum() / valid.sum(), rtol=1e-6)
    np.testing.assert_array_equal(scaled[3], 0)


def test_an_estimator_of_your_own_is_called_like_a_row():
    """With 0 for what was not scored, the samples that were, and the options; what was not scored stays 0 after it."""
    rewards, valid, lengths, greedy = rewards_for("grpo")
    seen = []

    def own(rewards, scored, options):
        seen.append((np.asarray(rewards), np.asarray(scored), options))
        return algo.ADVANTAGES["opo"](rewards, scored, options) + 1.0

    missing = np.where(valid, rewards, np.nan)
    got = estimate(own, missing, np.ones_like(valid), lengths, greedy)
    expected = estimate("opo", rewards, valid, lengths, greedy)
    np.testing.assert_array_equal(got, np.where(valid, expected + 1.0, 0.0))
    ((given, scored, options),) = seen
    assert (given == np.where(valid, rewards, 0)).all() and (scored == valid).all() and options.k == 2


@estimators
@pytest.mark.parametrize("size", [1e-30, 1e30, float(np.finfo(np.float32).max)])
def test_rewards_of_any_size_give_finite_advantages(name, size):
    rewards = np.array([[1.0, -1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 0.0, -1.0]], np.float32) * size
    rewards[1] = [1.0, 0.0, 1.0, 1.0]
    rewards = np.stack([rewards, -rewards]) if name == "gdpo" else rewards
    out = estimate(name, rewards, np.ones((3, 4), bool), np.full((3, 4), 3), np.array([0.0, 1.0, -size]))
    assert np.isfinite(out).all()
    assert (out[0] != 0).any() != (name == "maxrl" and size < 1)  # whose mean is below eps there


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e30, 3e38])
def test_without_eps_normalised_advantages_know_no_size(size):
    rewards = jnp.array([[1.0, -1.0, 1.0, 0.5]])
    for options in (dict(), dict(ddof=0), dict(estimator="pass_at_k", k=2), dict(estimator="lite_ppo")):
        expected = algo.group_advantages(rewards, eps=0.0, **options)
        got = algo.group_advantages(rewards * size, eps=0.0, **options)
        np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_pass_at_k_without_eps_where_every_subset_has_the_same_best():
    rewards = jnp.array([[1.0, 1.0, 0.0, 1.0], [0.3, 0.7, 0.7, 0.1], [0.0, 0.5, 0.25, 0.75]])
    valid = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], bool)
    out = algo.group_advantages(rewards, estimator="pass_at_k", k=3, valid=valid, eps=0.0)
    np.testing.assert_array_equal(out[jnp.array([0, 2])], 0)  # a wrong one is never the best of 3; fewer than 3
    np.testing.assert_array_equal(out[1], 0)
    assert (algo.group_advantages(rewards, estimator="pass_at_k", k=2, valid=valid, eps=0.0)[2, :2] == 0).all()
    assert (algo.group_advantages(rewards[2:], estimator="pass_at_k", k=3, eps=0.0) != 0).any()


# The KL and its gradient.

TRUE_GRADIENT = {
    "k1": lambda pi, ref: 0.0,
    "k2": lambda pi, ref: jnp.sum(pi * (jnp.log(pi) - jnp.log(ref))),
    "k3": lambda pi, ref: jnp.sum(ref * (jnp.log(ref) - jnp.log(pi))),
    "abs": lambda pi, ref: jnp.sum(jnp.abs(pi - ref)),
}
for _name in ("k1_plus", "k3_plus", "k1_unbiased", "k3_unbiased"):
    TRUE_GRADIENT[_name] = TRUE_GRADIENT["k2"]


@pytest.mark.parametrize("name", algo.KL_ESTIMATORS)
def test_what_the_gradient_of_each_estimator_estimates(name):
    """Exactly, by summing over a vocabulary of 6 with its probabilities."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        logits, other = (jnp.asarray(rng.normal(size=6)) for _ in range(2))
        pi, ref = jax.nn.softmax(logits), jax.nn.softmax(other)

        def expectation(z, behaviour):
            logp = jax.nn.log_softmax(z)
            kl = algo.KL_ESTIMATORS[name](jnp.log(ref) - logp, jnp.exp(logp) / behaviour)
            return jnp.sum(behaviour * kl)

        got = jax.grad(expectation)(logits, pi)
        expected = jax.grad(lambda z: TRUE_GRADIENT[name](jax.nn.softmax(z), ref) + 0.0 * jnp.sum(z))(logits)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        if name.endswith("_unbiased"):
            elsewhere = jax.grad(expectation)(logits, jax.nn.softmax(jnp.asarray(rng.normal(size=6))))
            np.testing.assert_allclose(elsewhere, expected, rtol=0, atol=1e-12)
        if name not in ("k2", "abs"):
            np.testing.assert_allclose(expectation(logits, pi), TRUE_GRADIENT["k2"](pi, ref), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", algo.KL_ESTIMATORS)
def test_no_kl_and_no_gradient_at_the_reference(name):
    value, slope = jax.value_and_grad(lambda x: algo.KL_ESTIMATORS[name](x, jnp.exp(x)))(0.0)
    assert value == 0 and (slope == 0 or name.startswith("k1"))
