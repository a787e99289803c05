"""Dynamic sampling: what is kept, what is dropped, when it gives up, and what a resume must not forget."""

import numpy as np
import pytest

from grpo_jax.collect import Collector
from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream
from grpo_jax.metrics import Phases
from grpo_jax.rewards import RewardPool
from grpo_jax.rollout import Group, Sampling
from grpo_jax.scoring import Scorer
from grpo_jax.testing import tiny_tokenizer
from grpo_jax.types import Rollout

SAMPLES, PROMPTS, LIMIT = 4, 3, 2
TOKENIZER = tiny_tokenizer()


class EveryOther:
    """An engine whose completions say their sample's number, and which keeps what it was asked."""

    def __init__(self):
        self.asked: list[list[int]] = []

    def generate(self, params, prompts, *, num_samples, sampling, seed, step):
        self.asked.append([prompt.request_id for prompt in prompts])
        rows = len(prompts) * num_samples
        width = max(len(prompt.tokens) for prompt in prompts)
        tokens = np.zeros((rows, 8), np.int32)
        start = np.repeat([len(prompt.tokens) for prompt in prompts], num_samples).astype(np.int32)
        assert width + LIMIT <= 8
        for n in range(rows):
            prompt = prompts[n // num_samples].tokens
            tokens[n, : len(prompt)] = prompt
            tokens[n, len(prompt)] = TOKENIZER(str(n % num_samples))["input_ids"][0]
        one = np.ones(rows, np.int32)
        return Rollout(tokens, start, one, np.zeros((rows, 8), np.float32), np.full(rows, "stop"))

    def stream(self, params, prompts, *, num_samples, **rest):
        """The groups of `generate`, the last one first."""
        rollout = self.generate(params, prompts, num_samples=num_samples, **rest)
        for place in reversed(range(len(prompts))):
            yield Group(place, rollout.take(slice(place * num_samples, (place + 1) * num_samples)))


def by_kind(prompts, completions, completion_ids, kind, **columns):
    """1 for "solved", 0 for "hopeless", and 1 for the first half of the samples of "mixed"."""
    level = {"solved": SAMPLES, "hopeless": 0, "mixed": SAMPLES // 2}
    return [float(int(text) < level[k]) for text, k in zip(completions, kind, strict=True)]


def collector(kinds, rounds=4, dynamic=True, **algorithm):
    config = TrainConfig.from_tables(
        {
            "rollout": {"prompts_per_step": PROMPTS, "num_samples": SAMPLES, "max_new_tokens": LIMIT},
            "algorithm": {"dynamic_sampling": dynamic, "max_rounds": rounds, "soft_overlong": True, **algorithm},
            "reward": {"functions": ["by_kind"]},
        }
    )
    rows = [{"prompt": f"a{i}", "kind": kind} for i, kind in enumerate(kinds)]
    stream = PromptStream([PromptSet(rows, TOKENIZER)], seed=0, prompts_per_step=PROMPTS, shuffle=False)
    engine, pool = EveryOther(), RewardPool([by_kind], 30.0, None)
    scorer = Scorer(pool, TOKENIZER, frozenset({1}), config)
    sampling = Sampling(max_new_tokens=LIMIT, stop_ids=(1,))
    return Collector(stream, engine, scorer, sampling, config, Phases()), engine


def ids(batch):
    return [prompt.request_id for prompt in batch.prompts]


MIXED, SOLVED, HOPELESS = "mixed", "solved", "hopeless"


def test_without_it_one_round_is_all():
    parts, engine = collector([SOLVED, MIXED, HOPELESS], dynamic=False)
    batch = parts.next(None, 0)
    assert engine.asked == [[0, 1, 2]] and ids(batch) == [0, 1, 2]
    assert batch.scored.counted.all() and batch.metrics == {}


def test_groups_without_spread_are_dropped_and_sampling_goes_on_until_the_batch_is_full():
    parts, engine = collector([MIXED, SOLVED, HOPELESS, SOLVED, MIXED, MIXED, MIXED, SOLVED, MIXED])
    batch = parts.next(None, 0)
    assert engine.asked == [[0, 1, 2], [3, 4, 5]]
    assert ids(batch) == [0, 4, 5] and batch.scored.counted.all() and not batch.warnings
    assert [prompt.text for prompt in batch.prompts] == ["a0", "a4", "a5"]
    assert batch.metrics["dynamic_sampling/rounds"] == 2 and batch.metrics["dynamic_sampling/groups_sampled"] == 6
    assert batch.metrics["dynamic_sampling/groups_without_spread"] == 3
    rows = batch.rollout.tokens[::SAMPLES, :2]
    np.testing.assert_array_equal(rows, [prompt.tokens for prompt in batch.prompts])
    np.testing.assert_array_equal(np.sign(batch.scored.advantages), [1, 1, -1, -1] * PROMPTS)


def test_what_is_left_over_is_drawn_first_by_the_next_step():
    parts, engine = collector([SOLVED, MIXED, MIXED, MIXED, MIXED, MIXED, MIXED, MIXED, MIXED])
    assert ids(parts.next(None, 0)) == [1, 2, 3]
    assert ids(parts.next(None, 1)) == [4, 5, 6]
    assert engine.asked == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]


def test_a_resume_knows_what_is_left_over_and_what_was_counted():
    kinds = [SOLVED, MIXED, MIXED, MIXED, MIXED, MIXED, HOPELESS, MIXED, MIXED]
    straight, engine = collector(kinds)
    first = straight.next(None, 0)
    state = straight.state()
    assert state["left_over"] == [4, 5] and state["counts"]["groups_left_over"] == 2
    second = straight.next(None, 1)
    again, engine_again = collector(kinds)
    again.restore(state)
    resumed = again.next(None, 1)
    assert ids(resumed) == ids(second) != ids(first) and engine_again.asked == engine.asked[2:]
    assert again.state() == straight.state()
    assert again.state()["counts"]["groups_sampled"] == 12


def test_when_the_budget_is_spent_the_step_trains_on_what_there_is_and_says_so():
    parts, engine = collector([SOLVED, MIXED, HOPELESS, SOLVED, SOLVED, HOPELESS], rounds=2)
    batch = parts.next(None, 0)
    assert len(engine.asked) == 2 and ids(batch)[0] == 1 and len(batch.prompts) == PROMPTS
    assert batch.scored.counted.tolist() == [True, False, False]
    assert batch.scored.mask.any(1).reshape(PROMPTS, SAMPLES).tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert "1 of 3 groups" in batch.warnings[0] and "algorithm.max_rounds" in batch.warnings[0]
    assert parts.state()["counts"]["steps_not_full"] == 1


@pytest.mark.parametrize("kind", [SOLVED, HOPELESS])
def test_with_nothing_kept_nothing_is_trained(kind):
    parts, engine = collector([kind] * 6, rounds=3)
    batch = parts.next(None, 0)
    assert len(engine.asked) == 3 and len(batch.prompts) == PROMPTS
    assert not batch.scored.mask.any() and not batch.scored.counted.any() and not batch.scored.advantages.any()
    assert parts.state()["left_over"] == []


def test_shaping_makes_no_spread():
    """The unshaped reward decides: lengths differ, so the overlong penalty would, too."""
    parts, engine = collector([HOPELESS] * 3, rounds=1, overlong_buffer_len=2)
    assert not parts.next(None, 0).scored.counted.any()


def test_batch_statistics_are_those_of_the_groups_that_count():
    kinds = [SOLVED, MIXED, HOPELESS] * 2
    kept, _ = collector(kinds, rounds=1, advantage="batch_mean")
    batch = kept.next(None, 0)
    group = batch.scored.advantages.reshape(PROMPTS, SAMPLES)[batch.scored.counted]
    np.testing.assert_allclose(group, [[0.5, 0.5, -0.5, -0.5]])
