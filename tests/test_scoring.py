"""Rewards of several functions -> advantages: each estimator gets what it needs, and edges are what MATH.md says."""

import numpy as np
import pytest
from learning_cases import LIMIT, SAMPLES, collected_for, config_for, rollout_for

from grpo_jax.scoring import Answers, Scorer


def judged(config, by_function, counted=(True,) * 4):
    rewards = np.broadcast_to(np.asarray(by_function, np.float32), (2, 16))
    scorer = Scorer(None, None, frozenset(), config)
    return scorer.judge(rollout_for(), Answers([""] * 16, rewards), np.asarray(counted))


def test_remax_takes_its_baseline_from_the_greedy_completions():
    config = config_for("remax")
    scored = collected_for(config).scored
    # Weights 1 and .5; the last prompt's greedy completion is paid by the first function alone, the third by none.
    np.testing.assert_array_equal(scored.greedy, np.asarray([1.0, 0.5, np.nan, 1.0], np.float32))
    expected = np.where(scored.scored, scored.reward - np.nan_to_num(scored.greedy)[:, None], 0)
    expected[2] = 0
    np.testing.assert_allclose(scored.advantages.reshape(4, 4), expected, atol=1e-6)


def test_gdpo_normalises_each_function_and_pass_at_k_takes_k():
    config = config_for("gdpo")
    scored = collected_for(config).scored
    parts = []
    for rewards in np.asarray(scored.by_function, np.float64).reshape(2, 4, 4):
        mean, std = np.nanmean(rewards, 1, keepdims=True), np.nanstd(rewards, 1, ddof=1, keepdims=True)
        parts.append(np.nan_to_num(np.where(std > 0, (rewards - mean) / (std + 1e-4), 0)))
    total = parts[0] + 0.5 * parts[1]
    valid = scored.scored
    total = np.where(valid, (total - total[valid].mean()) / (total[valid].std(ddof=1) + 1e-4), 0)
    np.testing.assert_allclose(scored.advantages.reshape(4, 4), total, atol=1e-5)
    k_one, k_two = (
        collected_for(config_for("bnpo", algorithm={"advantage": "pass_at_k", "pass_k": k})).scored for k in (1, 2)
    )
    plain = collected_for(config_for("bnpo", algorithm={"ddof": 0})).scored
    np.testing.assert_allclose(k_one.advantages, plain.advantages, atol=1e-4)
    assert np.abs(k_two.advantages - k_one.advantages).max() > 0.1


def test_rewards_and_advantages_are_clipped_where_asked():
    clipped = collected_for(config_for("bnpo", algorithm={"reward_clip": 0.75, "advantage_clip": 0.5})).scored
    plain = collected_for(config_for("bnpo")).scored
    np.testing.assert_allclose(clipped.reward, np.clip(plain.reward, -0.75, 0.75))
    assert np.abs(clipped.advantages).max() == 0.5 < np.abs(plain.advantages).max()
    greedy = collected_for(config_for("remax", algorithm={"reward_clip": 0.75})).scored.greedy
    np.testing.assert_array_equal(greedy, np.asarray([0.75, 0.5, np.nan, 0.75], np.float32))


def test_groups_that_do_not_count_are_in_no_statistic_and_train_nothing():
    config = config_for("reinforce_pp", algorithm={"loss": {"kl_in_reward": False, "kl_coef": 0.0}})
    rewards = np.random.default_rng(0).standard_normal((2, 16))
    rewards[:, 8:12] = 50.0
    scored = judged(config, rewards, (True, True, False, True))
    kept = np.repeat([True, True, False, True], SAMPLES)
    total = (rewards[0] + 0.5 * rewards[1])[kept]
    np.testing.assert_allclose(scored.advantages[kept], (total - total.mean()) / total.std(ddof=1), atol=1e-5)
    assert (scored.advantages[~kept] == 0).all() and not scored.mask[~kept].any() and scored.mask[kept].any()
    assert (scored.valid == (kept.reshape(4, 4) & scored.scored)).all()
    counted, fewer = (True, True, False, True), rewards.copy()
    fewer[:, 8:12] = np.nan
    np.testing.assert_array_equal(
        judged(config_for("gdpo"), rewards, counted).advantages, judged(config_for("gdpo"), fewer).advantages
    )


def test_soft_overlong_shapes_the_reward_but_not_the_spread_and_the_filter_keeps_rewards():
    algorithm = {"soft_overlong": True, "overlong_buffer_len": 4, "overlong_filter": True}
    scored = judged(config_for("bnpo", algorithm=algorithm), np.ones((2, 16)))
    lengths, limit = rollout_for().completion_len, rollout_for().finish == "length"
    np.testing.assert_allclose(scored.reward.reshape(-1), 1.5 - np.clip((lengths - (LIMIT - 4)) / 4, 0, 1), atol=1e-6)
    assert not scored.spread.any() and np.abs(scored.advantages).max() > 0.1
    assert limit.any() and not scored.mask[limit].any()
    assert (scored.mask.sum(1) == np.where(limit, 0, lengths)).all()


def test_a_weighted_reward_beyond_float32_is_an_error_that_names_the_field():
    config = config_for("bnpo", reward={"functions": ["a", "b"], "weights": [1e38, 1.0]})
    with pytest.raises(ValueError, match=r"reward.weights: the weighted sum of \[100.0, 100.0\] is beyond float32"):
        judged(config, np.full((2, 16), 100.0))


def test_token_weights_whiten_by_length():
    config = config_for("bnpo", algorithm={"advantage": "reinforce_pp", "weight": "tokens"})
    rewards = np.random.default_rng(1).standard_normal((2, 16))
    scored = judged(config, rewards)
    total, lengths = rewards[0] + 0.5 * rewards[1], rollout_for().completion_len.astype(float)
    mean = np.average(total, weights=lengths)
    std = np.sqrt((lengths * (total - mean) ** 2).sum() / (lengths.sum() - 1))
    np.testing.assert_allclose(scored.advantages, (total - mean) / std, atol=1e-5)


def test_advantages_wait_for_the_learner_where_they_are_made_of_what_it_computes():
    for preset in ("ppo", "rloo", "reinforce_pp"):
        scored = collected_for(config_for(preset)).scored
        assert (scored.advantages == 0).all() and scored.spread.any()
