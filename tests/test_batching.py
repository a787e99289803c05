"""Rows of three kinds from one rollout: each completion token stands in exactly one place, with its own neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.batching import Layout, minibatches, pack
from grpo_jax.types import Rollout

KINDS = ("padded", "packed", "group")
PROMPT, LIMIT = 6, 7


def make_rollout(prompt_lens: list[int], completion_lens: list[int], samples: int) -> Rollout:
    """Rows whose every token is unique, so that a token says where it came from."""
    start = np.repeat(np.array(prompt_lens, np.int32), samples)
    length = np.array(completion_lens, np.int32)
    tokens = np.zeros((len(start), PROMPT + LIMIT), np.int32)
    for n in range(len(start)):
        tokens[n, : start[n]] = 10_000 * (1 + n // samples) + np.arange(start[n])
        tokens[n, start[n] : start[n] + length[n]] = 1_000_000 * (n + 1) + np.arange(length[n])
    logp = np.where(tokens >= 1_000_000, -tokens / 1e7, 0).astype(np.float32)
    return Rollout(tokens, start, length, logp, np.where(length < LIMIT, "stop", "length"))


@st.composite
def rollouts(draw):
    samples = draw(st.sampled_from([2, 3]))
    prompts = draw(st.integers(1, 5))
    prompt_lens = draw(st.lists(st.integers(1, PROMPT), min_size=prompts, max_size=prompts))
    count = prompts * samples
    return make_rollout(prompt_lens, draw(st.lists(st.integers(0, LIMIT), min_size=count, max_size=count)), samples)


def layout_of(kind: str, rollout: Rollout, row_multiple: int = 1) -> Layout:
    row_len = PROMPT + LIMIT if kind == "padded" else 2 * (PROMPT + LIMIT) + 1
    return Layout(kind, row_len, len(rollout.tokens), row_multiple)


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, max_examples=60)
@given(rollout=rollouts(), row_multiple=st.sampled_from([1, 4]))
def test_each_completion_token_is_trained_once_in_its_own_context(kind, rollout, row_multiple):
    advantages = np.arange(len(rollout.tokens), dtype=np.float32) + 0.5
    layout = layout_of(kind, rollout, row_multiple)
    batch = pack(rollout, advantages, rollout.completion_mask, layout)
    assert batch.tokens.shape[0] in layout.row_counts and batch.tokens.shape[0] % row_multiple == 0
    trained = batch.tokens[batch.mask]
    assert sorted(trained.tolist()) == sorted(rollout.tokens[rollout.completion_mask].tolist())
    np.testing.assert_array_equal(batch.advantages[batch.mask], trained // 1_000_000 - 1 + 0.5)
    np.testing.assert_allclose(batch.sampler_logp[batch.mask], -trained / 1e7, rtol=1e-6)
    for row, column in np.argwhere(batch.mask):
        n, place = divmod(int(batch.tokens[row, column]), 1_000_000)
        start = int(rollout.prompt_len[n - 1])
        segment = batch.segment_ids[row]
        context = None if batch.context_ids is None else int(batch.context_ids[row, column])
        seen = (segment == segment[column]) | (segment == context if context else False)
        seen &= np.arange(layout.row_len) < column
        expected = rollout.tokens[n - 1, : start + place].tolist()
        assert batch.tokens[row][seen].tolist() == expected
        assert batch.positions[row][seen].tolist() == list(range(start + place))
        assert batch.positions[row, column] == start + place
        assert batch.tokens[row, batch.source[row, column]] == expected[-1]
        assert seen[batch.source[row, column]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_trained_stays_in_the_context(kind):
    rollout = make_rollout([3, 5], [4, LIMIT, 0, 2], 2)
    mask = rollout.completion_mask & (rollout.finish != "length")[:, None]
    batch = pack(rollout, np.ones(4, np.float32), mask, layout_of(kind, rollout))
    assert batch.mask.sum() == 6
    assert set(rollout.tokens[rollout.completion_mask]) <= set(batch.tokens[batch.segment_ids > 0])


def test_packing_uses_fewer_rows_and_group_holds_a_prompt_once():
    rollout = make_rollout([6] * 4, [3] * 16, 4)
    rows = {kind: (pack(rollout, np.ones(16), rollout.completion_mask, layout_of(kind, rollout))) for kind in KINDS}
    used = {kind: int((batch.segment_ids > 0).any(1).sum()) for kind, batch in rows.items()}
    assert used == {"padded": 16, "packed": 6, "group": 4}
    assert all((rows["group"].tokens == 10_000 * q).sum() == 1 for q in range(1, 5))


def test_row_counts_are_few_known_and_divide():
    for kind in KINDS:
        counts = Layout(kind, 40, 100, 12).row_counts
        assert len(counts) <= 8 and all(c % 12 == 0 for c in counts) and counts[-1] >= 100


def test_minibatches_are_equal_and_keep_groups_whole():
    rollout = make_rollout([3] * 6, [2] * 24, 4)
    parts = [rollout.take(rows) for rows in minibatches(rollout, 3)]
    assert [len(p.tokens) for p in parts] == [8, 8, 8]
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), rollout.tokens)


def test_refuses_a_completion_longer_than_a_row():
    rollout = make_rollout([6], [7, 7], 2)
    with pytest.raises(ValueError, match="row_len: a prompt with its completion has 13 tokens and a row holds 12"):
        pack(rollout, np.ones(2), rollout.completion_mask, Layout("packed", 12, 2))
