"""Rows of three kinds from one rollout: each completion token stands in exactly one place, with its own neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.batching import ROW_COUNTS, layout_for, minibatches, pack
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


def layout_of(kind: str, rollout: Rollout, row_multiple: int = 1, row_len: int | None = None):
    samples = int((rollout.tokens[:, 0] == rollout.tokens[0, 0]).sum())
    return layout_for(kind, PROMPT, LIMIT, len(rollout.tokens), samples, row_multiple, row_len)


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, max_examples=60)
@given(rollout=rollouts(), row_multiple=st.sampled_from([1, 4]), more=st.sampled_from([None, 0, 5, 9]))
def test_each_completion_token_is_trained_once_in_its_own_context(kind, rollout, row_multiple, more):
    advantages = np.arange(len(rollout.tokens), dtype=np.float32) + 0.5
    layout = layout_of(kind, rollout, row_multiple, None if more is None else PROMPT + LIMIT + more)
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
        if layout.shared is not None:  # what is seen lies in the prompt's columns and in the token's own block
            block = lambda place: (place - layout.shared.prompt_len) // layout.shared.block_len  # noqa: E731
            assert all(block(place) in (-1, block(column)) for place in np.flatnonzero(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_trained_stays_in_the_context(kind):
    rollout = make_rollout([3, 5], [4, LIMIT, 0, 2], 2)
    mask = rollout.completion_mask & (rollout.finish != "length")[:, None]
    batch = pack(rollout, np.ones(4, np.float32), mask, layout_of(kind, rollout))
    assert batch.mask.sum() == 6 and (batch.sample_ids >= 0).sum() == rollout.completion_len.sum()
    assert set(rollout.tokens[rollout.completion_mask]) <= set(batch.tokens[batch.segment_ids > 0])


def test_packing_uses_fewer_rows_and_group_holds_a_prompt_once():
    rollout = make_rollout([6] * 4, [3] * 16, 4)
    rows = {kind: (pack(rollout, np.ones(16), rollout.completion_mask, layout_of(kind, rollout))) for kind in KINDS}
    used = {kind: int((batch.segment_ids > 0).any(1).sum()) for kind, batch in rows.items()}
    assert used == {"padded": 16, "packed": 8, "group": 4}
    assert all((rows["group"].tokens == 10_000 * q).sum() == 1 for q in range(1, 5))
    rollout = make_rollout(
        [5], [0, 1, 3, 2], 4
    )  # with their prompt 5, 6, 8 and 7: two rows of 13 where long ones go first
    batch = pack(rollout, np.ones(4), rollout.completion_mask, layout_of("packed", rollout, row_len=13))
    assert (batch.segment_ids > 0).any(1).sum() == 2


def test_a_group_too_large_for_a_row_takes_several_and_rows_are_filled():
    rollout = make_rollout([6] * 4, [LIMIT, LIMIT, 4, 3, LIMIT, 1, 2, LIMIT], 2)
    wide = pack(rollout, np.ones(8), rollout.completion_mask, layout_of("group", rollout))
    narrow = pack(rollout, np.ones(8), rollout.completion_mask, layout_of("group", rollout, row_len=PROMPT + LIMIT + 2))
    assert wide.tokens.shape == (4, PROMPT + 2 * LIMIT) and narrow.tokens.shape[1] == PROMPT + LIMIT + 2
    prompts = [int((batch.tokens == 10_000).sum()) for batch in (wide, narrow)]
    assert prompts == [1, 2]  # only the first group has no room in one block of nine
    assert [(batch.segment_ids > 0).any(1).sum() for batch in (wide, narrow)] == [4, 5]


def test_row_counts_are_few_known_and_divide():
    for kind in KINDS:
        counts = layout_for(kind, PROMPT, LIMIT, 96, 8, 12).row_counts
        assert len(counts) <= ROW_COUNTS and all(c % 12 == 0 for c in counts)
        assert counts[-1] == {"padded": 96, "packed": 96, "group": 24}[kind]
    assert layout_for("group", PROMPT, LIMIT, 128, 16).row_counts == (8, 10, 12, 15, 18, 22, 27, 32)


def test_minibatches_are_equal_and_keep_groups_whole():
    rollout = make_rollout([3] * 6, [2] * 24, 4)
    parts = [rollout.take(rows) for rows in minibatches(rollout, 3)]
    assert [len(p.tokens) for p in parts] == [8, 8, 8]
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), rollout.tokens)


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "said"),
    [
        ("padded", 6, 6, "a prompt with its completion has 13 tokens and a row holds 12"),
        ("group", 5, 7, "a prompt has 6 tokens and a row holds 5"),
        ("group", 6, 6, "a completion has 7 tokens and a row holds 6"),
    ],
)
def test_refuses_what_is_longer_than_a_row(kind, prompt, completion, said):
    rollout = make_rollout([6], [7, 7], 2)
    with pytest.raises(ValueError, match=f"row_len: {said}"):
        pack(rollout, np.ones(2), rollout.completion_mask, layout_for(kind, prompt, completion, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_rows_in_which_the_longest_has_no_room(kind):
    assert layout_for(kind, PROMPT, LIMIT, 8, 2, row_len=13).row_len == 13
    with pytest.raises(ValueError, match="row_len: got 12, and a prompt with its completion has up to 6"):
        layout_for(kind, PROMPT, LIMIT, 8, 2, row_len=12)
