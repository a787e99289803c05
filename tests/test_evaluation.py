import itertools
import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import TrainConfig
from grpo_jax.evaluation import avg_at_k, bootstrap_interval, maj_at_k, meaningless, pass_at_k, verdicts
from grpo_jax.evaluator import Evaluator
from grpo_jax.rollout import Sampling
from grpo_jax.scoring import Answers


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            wanted = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert float(pass_at_k(n, c, k)) == pytest.approx(float(wanted), abs=1e-15)


def test_pass_at_k_over_problems_and_its_limits():
    n, c = np.array([5, 7, 9]), np.array([0, 7, 4])
    np.testing.assert_allclose(pass_at_k(n, c, 3), [pass_at_k(int(a), int(b), 3) for a, b in zip(n, c, strict=True)])
    np.testing.assert_array_equal(pass_at_k(n, c, 1)[:2], [0.0, 1.0])
    np.testing.assert_allclose(pass_at_k(n, c, 1), avg_at_k(n, c), rtol=1e-15)
    np.testing.assert_array_equal(pass_at_k(6, np.arange(7), 6), [0, 1, 1, 1, 1, 1, 1])
    assert np.all(np.diff([pass_at_k(9, 4, k) for k in range(1, 10)]) >= 0)
    large = pass_at_k(10_000, 3, 5_000)
    assert float(large) == pytest.approx(1 - math.comb(9_997, 5_000) / math.comb(10_000, 5_000), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2), (0, 0, 1), ([4, 2], [1, 1], 3)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="got"):
        pass_at_k(n, c, k)


def test_avg_at_k():
    np.testing.assert_array_equal(avg_at_k(4, [0, 1, 4]), [0, 0.25, 1])
    with pytest.raises(ValueError, match="got n = 0"):
        avg_at_k(0, 0)


def brute_majority(answers, right):
    """The chance to be right of one who votes with a most frequent parsed answer, picked at random."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return Fraction(0)
    best = [answer for answer in votes if votes[answer] == max(votes.values())]
    return sum((Fraction(int(answer == right), len(best)) for answer in best), Fraction(0))


def test_maj_at_k_is_the_vote_with_ties_shared():
    options = [None, "1", "2", "3"]
    for k in range(1, 6):
        answers = [list(row) for row in itertools.product(options, repeat=k)]
        correct = [[answer == "1" for answer in row] for row in answers]
        wanted = [float(brute_majority(row, "1")) for row in answers]
        np.testing.assert_allclose(maj_at_k(answers, correct), wanted, atol=1e-15)


@given(st.lists(st.sampled_from([None, "7", "8", 9]), min_size=1, max_size=9), st.randoms())
def test_maj_at_k_does_not_depend_on_the_order(row, random):
    mixed = random.sample(row, len(row))
    both = maj_at_k([row, mixed], [[answer == "7" for answer in each] for each in (row, mixed)])
    assert both[0] == both[1]


def test_maj_at_k_by_hand():
    assert maj_at_k([[None, None, None, "5"]], [[False, False, False, True]]) == [1.0]
    assert maj_at_k([["5", "5", "6"]], [[True, False, False]]) == [0.5]
    assert maj_at_k([["5", "5.0", "6", "6"]], [[True, True, False, False]]) == [0.0]
    assert maj_at_k([["5", "5.0", "6"]], [[True, True, False]]) == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="answers of 1 problems and correct of shape"):
        maj_at_k([["5", "6"]], [[True]])


def test_bootstrap_is_the_distribution_of_resampled_means():
    values = np.array([0.0, 0.0, 1.0, 0.5, 0.25])
    every = np.mean(list(itertools.product(values, repeat=5)), axis=1)  # all 5**5 resamples, equally likely
    low, high = bootstrap_interval(values, draws=20_000, seed=3)
    ranks = [np.mean(every <= low), np.mean(every < high)]
    assert ranks[0] >= 0.025 - 0.01 and np.mean(every < low) <= 0.025 + 0.01
    assert ranks[1] <= 0.975 + 0.01 and np.mean(every <= high) >= 0.975 - 0.01


@settings(max_examples=30)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.integers(0, 2**32))
def test_bootstrap_lies_within_the_values_and_repeats(values, seed):
    low, high = bootstrap_interval(values, draws=50, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(values, draws=50, seed=seed)


def test_bootstrap_covers_the_mean_of_the_population():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.random(60) < 0.3, draws=300, seed=seed)
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 0.99  # nominal 0.95, sd of the share 0.015


def test_bootstrap_edges():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert bootstrap_interval(np.arange(50.0), seed=1) != bootstrap_interval(np.arange(50.0), seed=2)
    for values in ([], [np.nan], [[1.0]], [np.inf, 0.0]):
        with pytest.raises(ValueError, match="bootstrap: got values"):
            bootstrap_interval(values)
    with pytest.raises(ValueError, match="got 0 draws"):
        bootstrap_interval([1.0], draws=0)


def test_a_sample_without_a_reward_is_neither_right_nor_wrong():
    judged, right = verdicts([[1.0, 0.0], [np.nan, 1.0], [0.6, 0.5], [np.nan, np.nan]], 0.5)
    assert judged.tolist() == [True, False, True, False] and right.tolist() == [[True, False], [True, False]]
    assert meaningless([True] * 18 + [False] * 2, "f") is None
    assert "'f' did not score all samples of 3 of 20 prompts" in meaningless([True] * 17 + [False] * 3, "f")


class Says:
    """A scorer that is asked for the first function alone, and says what it is told."""

    def __init__(self, *said):
        self.said = list(said)

    def rewards(self, prompts, rollout, state, only):
        assert only == (0,)
        rewards = np.asarray(self.said.pop(0), np.float32)
        return Answers([""] * len(rewards), np.stack([rewards, np.full_like(rewards, np.nan)]), ("a loss",))


@pytest.mark.parametrize(
    ("greedy", "samples", "expected", "means"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0], (0.5, 0.375, 0.5, 0), True),
        ([1, None, 1, 0], [1, 0, 1, 1, None, 0, 0, 0], (2 / 3, 0.5, 2 / 3, 2), False),
        ([None] * 4, [None] * 8, (math.nan, math.nan, math.nan, 12), False),
    ],
)
def test_an_evaluation_counts_what_was_not_scored_and_leaves_it_out(greedy, samples, expected, means):
    config = TrainConfig.from_tables({"eval": {"samples": 2}, "reward": {"functions": ["own.py:judge", "b.py:f"]}})
    said = [[np.nan if value is None else value for value in values] for values in (greedy, samples)]
    warnings, held_out = [], {"eval": SimpleNamespace(prompts=[None] * 4)}
    engine = SimpleNamespace(generate=lambda *_, **__: None)
    parts = (held_out, engine, Says(*said), Sampling(max_new_tokens=4), config, warnings.append)
    out = Evaluator(*parts).evaluate(None)
    names = ("accuracy", "avg_at_k", "pass_at_k", "unscored")
    np.testing.assert_allclose([out[f"eval/{name}"] for name in names], expected, rtol=1e-6)
    assert any("'judge' did not score" in text and "mean nothing" in text for text in warnings) != means
