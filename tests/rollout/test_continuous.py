"""Slots, queue and moves: nothing of them is seen in what is sampled; groups come when they are done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from static_engine import StaticEngine
from test_engine import assert_same_but_for_boundaries, completions, learner_logp

from grpo_jax.metrics import CompileLog
from grpo_jax.rollout import ContinuousEngine, Sampling, shapes
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [3, 3], [20, 21, 22, 23, 24]]
ASKED = [Prompt(i, tuple(p)) for i, p in enumerate(PROMPTS)]
SAMPLES, LIMIT = 4, 70
SAMPLING = Sampling(max_new_tokens=LIMIT, stop_ids=(1,))
CALL = {"num_samples": SAMPLES, "sampling": SAMPLING, "seed": 0, "step": 0}
ENGINES = {"cohort": {}, "8 slots": {"slots": 8}, "12 slots": {"slots": 12}, "refill": {"refill": True}}
FAST = ("cohort", "8 slots", "refill")
SHORT = {"num_samples": 2, "seed": 0, "step": 0}


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def static(tiny):
    model, params = tiny
    return StaticEngine(model, 16).generate(params, ASKED, **CALL)


@pytest.mark.parametrize("name", slow_but(FAST, ENGINES))
def test_contract_4_slots_and_schedule_change_no_token(tiny, static, name):
    model, params = tiny
    rollout = ContinuousEngine(model, 16, **ENGINES[name]).generate(params, ASKED, **CALL)
    assert_same_but_for_boundaries(model, params, static, rollout, range(5), SAMPLES)
    same = [a == b for a, b in zip(completions(static), completions(rollout), strict=True)]
    assert np.mean(same) > 0.8
    np.testing.assert_array_equal(static.finish[same], rollout.finish[same])
    gap = np.abs(learner_logp(model, params, rollout, 1.0) - rollout.sampler_logp)[rollout.completion_mask]
    assert gap.size > 500 and gap.mean() <= 1e-5 and gap.max() <= 1e-4


def test_contract_4_a_cache_that_grows_changes_no_token(tiny, static, monkeypatch):
    model, params = tiny
    monkeypatch.setattr(shapes, "LONG", 32)
    call = ContinuousEngine(model, 16).stream(params, ASKED, **CALL)
    for _ in call:
        pass
    assert {shape.length for shape in call.counts.shapes} == {18, LIMIT}
    rollout = call.sampled.rollout(np.arange(len(ASKED) * SAMPLES))
    assert_same_but_for_boundaries(model, params, static, rollout, range(5), SAMPLES)
    gap = np.abs(learner_logp(model, params, rollout, 1.0) - rollout.sampler_logp)[rollout.completion_mask]
    assert gap.mean() <= 1e-5 and gap.max() <= 1e-4


@pytest.mark.parametrize("name", slow_but(FAST, ENGINES))
def test_groups_come_when_they_are_done(tiny, name):
    model, params = tiny
    engine = ContinuousEngine(model, 16, **ENGINES[name])
    limits = np.repeat([70, 20, 10, 60, 40], SAMPLES)
    whole = engine.generate(params, ASKED, limits=limits, **CALL)
    call = engine.stream(params, ASKED, limits=limits, **CALL)
    seen, steps = [], []
    for group in call:
        seen.append(group.prompt)
        steps.append(call.counts.steps)
        expected = whole.take(slice(group.prompt * SAMPLES, (group.prompt + 1) * SAMPLES))
        np.testing.assert_array_equal(group.rollout.tokens, expected.tokens)
        np.testing.assert_array_equal(group.rollout.sampler_logp, expected.sampler_logp)
        np.testing.assert_array_equal(group.rollout.finish, expected.finish)
    assert sorted(seen) == list(range(5)) and steps[0] < steps[-1] == call.counts.steps
    assert call.counts.live_steps == whole.completion_len.sum()
    assert call.counts.live_steps <= call.counts.slot_steps and call.counts.moves == len(call.counts.shapes) > 2
    assert all(shape in engine.shapes(5, SAMPLES, LIMIT).shapes for shape in call.counts.shapes)


LIMITS = {
    "all at the first token": [1] * 10,
    "all at once": [5] * 10,
    "one row far behind": [1] * 9 + [9],
    "at first, at last, between": [1, 9, 9, 1, 2, 3, 4, 5, 9, 1],
}


@pytest.mark.parametrize("slots", [None, 4])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_rows_end_at_limits_of_their_own(tiny, limits, slots):
    model, params = tiny
    sampling = Sampling(max_new_tokens=9)
    engine = ContinuousEngine(model, 16, slots)
    free = engine.generate(params, ASKED, sampling=sampling, **SHORT)
    rollout = engine.generate(params, ASKED, sampling=sampling, limits=limits, **SHORT)
    assert rollout.completion_len.tolist() == limits and set(rollout.finish) == {"length"}
    assert [a[:n] for a, n in zip(completions(free), limits, strict=True)] == completions(rollout)


def test_one_sample_and_one_token(tiny):
    model, params = tiny
    sampling = Sampling(max_new_tokens=1, stop_ids=(1,))
    rollout = ContinuousEngine(model, 16).generate(params, ASKED, num_samples=1, sampling=sampling, seed=0, step=0)
    assert rollout.completion_len.tolist() == [1] * 5
    long = ContinuousEngine(model, 16).generate(
        params, ASKED, num_samples=1, sampling=Sampling(max_new_tokens=9, stop_ids=(1,)), seed=0, step=0
    )
    assert [ids[:1] for ids in completions(long)] == completions(rollout)


def test_a_prompt_at_the_limit_and_one_beyond(tiny):
    model, params = tiny
    asked = [Prompt(0, (5,) * 16)]
    rollout = ContinuousEngine(model, 16).generate(params, asked, sampling=Sampling(max_new_tokens=9), **SHORT)
    assert rollout.tokens.shape == (2, 25) and rollout.completion_len.tolist() == [9, 9]
    with pytest.raises(ValueError, match="17 tokens"):
        ContinuousEngine(model, 16).generate(params, [Prompt(0, (5,) * 17)], sampling=Sampling(), **SHORT)


@pytest.mark.parametrize("calls", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("slots", [None, 8])
def test_contract_8_calls_with_other_lengths_compile_nothing(tiny, slots, calls):
    model, params = tiny
    engine = ContinuousEngine(model, 16, slots, ahead=True)
    rng = np.random.default_rng(0)

    def call(step: int) -> None:
        asked = [Prompt(int(rng.integers(2**40)), tuple(rng.integers(2, 61, rng.integers(1, 17)))) for _ in range(5)]
        limits = np.minimum(rng.geometric(1 / rng.integers(1, 40), 20), LIMIT)
        temperature = float(step % 3) / 2
        sampling = Sampling(temperature, max_new_tokens=LIMIT)
        engine.generate(params, asked, num_samples=4, sampling=sampling, seed=step, step=step, limits=limits)

    call(0)
    engine.wait()
    with CompileLog() as compiles:
        for step in range(1, calls + 1):
            call(step)
    assert compiles.names == []


def test_stopped_in_the_middle_nothing_stays_behind(tiny):
    model, params = tiny
    engine = ContinuousEngine(model, 16)
    whole = engine.generate(params, ASKED, **CALL)
    before = sum(x.nbytes for x in jax.live_arrays())
    with pytest.raises(KeyboardInterrupt):
        for _ in engine.stream(params, ASKED, **CALL):
            raise KeyboardInterrupt
    assert sum(x.nbytes for x in jax.live_arrays()) <= before
    again = engine.generate(params, ASKED, **CALL)
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    np.testing.assert_array_equal(whole.sampler_logp, again.sampler_logp)


def test_a_seed_of_its_own_for_each_prompt(tiny):
    model, params = tiny
    engine, sampling = ContinuousEngine(model, 16), Sampling(max_new_tokens=9)
    mixed = engine.generate(params, ASKED, sampling=sampling, seeds=[7, 0, 7, 0, 7], **SHORT)
    for seed in (0, 7):
        alike = engine.generate(params, ASKED, sampling=sampling, **SHORT | {"seed": seed})
        rows = [2 * q + g for q in range(5) for g in range(2) if [7, 0, 7, 0, 7][q] == seed]
        np.testing.assert_array_equal(mixed.tokens[rows], alike.tokens[rows])
    with pytest.raises(ValueError, match="seeds"):
        engine.generate(params, ASKED, sampling=sampling, seeds=[1], **SHORT)
    with pytest.raises(ValueError, match="limits"):
        engine.generate(params, ASKED, sampling=sampling, limits=[0] * 10, **SHORT)


def text_of(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("slots", [None, 8])
def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(tiny, slots):
    model, params = tiny
    free = ContinuousEngine(model, 16).generate(params, ASKED, **CALL)
    strings = ("ab", "t", "qq")
    call = CALL | {"sampling": Sampling(max_new_tokens=LIMIT, stop_ids=(1,), stop_strings=strings)}
    rollout = ContinuousEngine(model, 16, slots, decode=text_of).generate(params, ASKED, **call)
    ended = 0
    for n, (ids, got) in enumerate(zip(completions(free), completions(rollout), strict=True)):
        cuts = [i for i in range(1, len(ids) + 1) if any(s in text_of(ids[:i]) for s in strings)]
        ended += bool(cuts)
        assert got == (ids[: cuts[0]] if cuts else ids)
        assert rollout.finish[n] == ("stop" if cuts else free.finish[n])
    assert ended > 5
    with pytest.raises(ValueError, match="stop_strings"):
        ContinuousEngine(model, 16).generate(params, ASKED, **call)


def test_temporaries_of_a_segment_are_small_beside_the_parameters():
    """Nothing of a decode step copies the weights: what it holds beside its arguments is under a tenth of them."""
    model, params = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=32)
    engine = ContinuousEngine(model, 16)
    call = engine.stream(params, ASKED[:1], num_samples=2, sampling=Sampling(max_new_tokens=8), seed=0, step=0)
    size = call.segment_memory().temp_size_in_bytes
    parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    assert 0 < size < 0.1 * parameters
    assert jnp.asarray(list(call)[0].rollout.completion_len).tolist() == [8, 8]
