"""The list of shapes: short, complete, and wide enough for whatever rows stop when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rollout.shapes import MOST_SHAPES, Ladder, arrange, blocks_needed, cache_lengths, ladder

CALLS = st.tuples(
    st.integers(1, 70),  # prompts
    st.integers(1, 17),  # samples
    st.sampled_from([1, 6, 64, 65, 100, 256, 1000, 4096]),
    st.one_of(st.none(), st.integers(1, 300)),  # slots
    st.sampled_from([1, 2, 8]),  # shards
    st.sampled_from([None, True]),
)


def counts_of(rows: np.ndarray, samples: int) -> list[int]:
    return np.unique(rows // samples, return_counts=True)[1].tolist()


@settings(max_examples=200, deadline=None)
@given(CALLS, st.integers(0, 2**32 - 1))
def test_every_rollout_finds_its_way_through_the_shapes(call, seed):
    prompts, samples, limit, slots, shards, refill = call
    shapes = ladder(prompts, samples, limit, slots, shards, refill)
    assert 1 <= len(shapes.shapes) <= MOST_SHAPES and len(shapes.moves) <= 3 * len(shapes.shapes)
    for shape in shapes.shapes:
        assert shape.rows % shape.group == 0 and (shape.rows // shape.group) % shards == 0
        assert shape.rows <= shapes.slots and shape.length <= limit
    if not shapes.refill:
        assert shapes.first.rows == shapes.pool * samples >= prompts * samples
    listed = {(source, target) for source, target, _ in shapes.moves}
    # From the first shape, with all rows that can stand in it, to the last token: only listed moves, and all fit.
    rng = np.random.default_rng(seed)
    shape, rows = shapes.first, np.arange(min(prompts * samples, shapes.first.rows))
    while blocks_needed(counts_of(rows, samples), shape.group) * shape.group > shape.rows:
        rows = rows[:-1]  # the others wait in the queue
    length = 0
    while len(rows):
        seats, blocks = arrange(rows, samples, shape)
        assert sorted(seats[seats >= 0]) == sorted(rows) and len(blocks) * shape.group == shape.rows
        held = seats.reshape(-1, shape.group)
        assert all((row[row >= 0] // samples == block).all() for row, block in zip(held, blocks, strict=True))
        length = min(limit, length + int(rng.integers(1, 60)))
        rows = rows[rng.random(len(rows)) < 0.8] if length < limit else rows[:0]
        while len(rows):
            target = shapes.grown(shape) if length >= shape.length else shapes.closer(shape)
            if target is None or blocks_needed(counts_of(rows, samples), target.group) * target.group > target.rows:
                assert length < shape.length
                break
            assert (shape, target) in listed
            shape = target


def test_lengths_end_at_the_limit():
    assert cache_lengths(1) == [1] and cache_lengths(512) == [512] and cache_lengths(2048) == [512, 2048]


def occupancy(shapes: Ladder, lengths: np.ndarray) -> float:
    """Share of slot-steps with a live row, when rows that start together move down as soon as they fit."""
    shape, used, samples = shapes.first, 0, shapes.samples
    for step in range(lengths.max()):
        rows = np.flatnonzero(lengths > step)
        if step == shape.length:
            shape = shapes.grown(shape)
        while (target := shapes.closer(shape)) is not None:
            if blocks_needed(counts_of(rows, samples), target.group) * target.group > target.rows:
                break
            shape = target
        used += shape.rows
    return float(lengths.sum() / used)


@pytest.mark.parametrize(
    ("prompts", "samples", "cap", "mean", "least"),
    [(8, 16, 256, 60, 0.87), (16, 8, 256, 60, 0.87), (32, 8, 512, 120, 0.85), (64, 16, 2048, 570, 0.84)],
)
def test_few_slots_are_empty_on_lognormal_lengths(prompts, samples, cap, mean, least):
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.32, 0.8, prompts * samples)
    lengths = np.clip(np.rint(drawn), 1, cap).astype(int)
    shapes = ladder(prompts, samples, cap, None, 1)
    assert occupancy(shapes, lengths) >= least


def test_rows_that_must_start_together_need_slots():
    with pytest.raises(ValueError, match=r"rollout.slots: got 8 for 20 rows"):
        ladder(5, 4, 16, 8, 1, refill=False)


def test_arrange_refuses_what_does_not_fit():
    shape = ladder(4, 4, 16, None, 1).shapes[0]
    with pytest.raises(ValueError, match="do not fit"):
        arrange(np.arange(shape.rows + 1), 4, shape)
