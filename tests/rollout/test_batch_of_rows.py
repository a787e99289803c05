"""Contract 4 at a batch's size, 16 prompts times 8 samples, and rows that end at the edges of what they may."""

from collections.abc import Sequence

import numpy as np
import pytest
from test_engine import assert_same_but_for_boundaries, completions
from test_moved_rows import STOPS, assert_moved, sampled

from grpo_jax.rollout import Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt, Rollout

MANY = [Prompt(i, tuple(1 + (7 * i + j * j) % 60 for j in range(1 + i % 5))) for i in range(16)]
SIZE = {"sampling": Sampling(max_new_tokens=24, stop_ids=STOPS), "samples": 8}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def batch(tiny):
    """16 prompts times 8 samples that start together."""
    rollout, shapes = sampled(*tiny, MANY, **SIZE)
    assert_moved(shapes, None)
    return rollout


@pytest.mark.parametrize("slots", [pytest.param(64, marks=pytest.mark.slow), 8])
def test_contract_4_a_batch_of_128_rows_does_not_depend_on_the_slots(tiny, batch, slots):
    rollout, shapes = sampled(*tiny, MANY, slots=slots, **SIZE)
    assert shapes[0].rows == slots
    assert_moved(shapes, slots)
    assert_alike(tiny, batch, rollout, MANY, 8)


def test_contract_4_a_row_of_128_alone(tiny, batch):
    """Sample 0 of each prompt in a call of its own."""
    alone = [sampled(*tiny, [prompt], SIZE["sampling"], samples=1)[0] for prompt in MANY]
    assert_alike(tiny, batch.take(slice(0, None, 8)), joined(alone), MANY, 1)


def test_contract_4_a_group_of_128_rows_alone(tiny, batch):
    alone = [sampled(*tiny, [prompt], **SIZE)[0] for prompt in MANY]
    assert_alike(tiny, batch, joined(alone), MANY, 8)


def joined(parts: list[Rollout]) -> Rollout:
    names = ("tokens", "prompt_len", "completion_len", "sampler_logp", "finish")
    return Rollout(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def assert_alike(tiny, one: Rollout, other: Rollout, asked: Sequence[Prompt], samples: int) -> None:
    """Contract 4, and few rows that a boundary has cut apart; what is said of the others agrees."""
    assert_same_but_for_boundaries(*tiny, one, other, [p.request_id for p in asked], samples)
    same = (one.tokens == other.tokens).all(1)
    assert same.mean() > 0.9
    np.testing.assert_array_equal(one.finish[same], other.finish[same])
    np.testing.assert_allclose(one.sampler_logp[same], other.sampler_logp[same], rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [None, 8])
def test_a_stop_token_as_the_first_and_as_the_last_that_is_allowed(tiny, batch, slots):
    length, ended = batch.completion_len, batch.finish == "stop"
    assert (length[ended] == 1).any() and (length[ended] > 8).any() and (length[ended] == 24).any()
    limits = np.where(np.arange(len(length)) % 3 == 2, np.maximum(length - 1, 1), length)
    rollout, _ = sampled(*tiny, MANY, slots=slots, limits=limits, **SIZE)
    np.testing.assert_array_equal(rollout.completion_len, limits)
    np.testing.assert_array_equal(rollout.finish == "stop", ended & (limits == length))
    assert [ids[:n] for ids, n in zip(completions(batch), limits, strict=True)] == completions(rollout)


@pytest.mark.parametrize("slots", [None, 8])
def test_all_rows_stop_at_once_by_a_stop_token(tiny, slots):
    """One prompt for all, and no chance: every row draws the same token at the same step."""
    asked = [Prompt(i, (45, 20, 22)) for i in range(len(MANY))]
    rollout, shapes = sampled(*tiny, asked, Sampling(0.0, max_new_tokens=24, stop_ids=STOPS), slots, 8)
    assert len(set(shapes)) == 1 and (slots is None) == (len(shapes) == 1)
    assert set(rollout.finish) == {"stop"} and len(np.unique(rollout.tokens, axis=0)) == 1
    ids = rollout.completion_ids(0)
    assert 3 < len(ids) < 24 and ids[-1] in STOPS and not set(ids[:-1]) & set(STOPS)


def test_one_sample_of_several_prompts_in_three_slots(tiny, batch):
    rollout, shapes = sampled(*tiny, MANY, SIZE["sampling"], 3, 1)
    assert {shape.rows for shape in shapes} == {3} and len(shapes) > 3
    assert_alike(tiny, batch.take(slice(0, None, 8)), rollout, MANY, 1)
