"""The list of shapes: short, complete, and wide enough for whatever rows stop when."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rollout.shapes import MOST_SHAPES, Ladder, Shape, arrange, cache_lengths, ladder

CALLS = st.tuples(
    st.integers(1, 70),  # prompts
    st.integers(1, 17),  # samples
    st.sampled_from([1, 6, 64, 65, 100, 256, 1000, 4096]),
    st.one_of(st.none(), st.integers(1, 300)),  # slots
    st.sampled_from([1, 2, 8]),  # shards
    st.sampled_from([None, True]),
)


@settings(max_examples=200)
@given(CALLS, st.integers(0, 2**32 - 1))
def test_every_rollout_finds_its_way_through_the_shapes(call, seed):
    prompts, samples, limit, slots, shards, refill = call
    shapes = ladder(prompts, samples, limit, slots, shards, refill)
    assert 1 <= len(shapes.shapes) <= MOST_SHAPES and len(shapes.moves) <= 3 * len(shapes.shapes)
    for shape in shapes.shapes:
        assert shape.rows % shards == shape.blocks % shards == 0 and shape.rows <= shape.blocks * shape.group
        assert shape.rows <= (prompts * samples if slots is None else slots) + shards - 1 and shape.length <= limit
    if not shapes.refill:
        assert shapes.first.rows >= prompts * samples and (prompts % shards or shapes.whole)
        assert shapes.pool - shards < prompts <= shapes.pool
    listed = {(source, target) for source, target, _ in shapes.moves}
    # From the first shape, with all rows that can stand in it, to the last token: only listed moves, and all fit.
    rng = np.random.default_rng(seed)
    shape, rows = shapes.first, np.arange(min(prompts * samples, shapes.first.rows))
    while arrange(rows, samples, shape, shards) is None:
        assert shapes.refill
        rows = rows[:-1]  # the others wait in the queue
    length, seated = 0, arrange(rows, samples, shape, shards)
    while len(rows):
        check(seated, rows, samples, shape, shards)
        length = min(limit, length + int(rng.integers(1, 60)))
        rows = rows[rng.random(len(rows)) < 0.8] if length < limit else rows[:0]
        seated = replace(seated, row=np.where(np.isin(seated.row, rows), seated.row, -1))
        while len(rows):
            target = shapes.grown(shape) if length >= shape.length else shapes.closer(shape)
            there = None if target is None or target.grows(shape) else arrange(rows, samples, target, shards)
            if target is None or (there is None and not target.grows(shape)):
                assert length < shape.length
                break
            assert (shape, target) in listed
            shape, seated = target, there or seated


def check(seated, rows, samples, shape, shards):
    """Each row has a slot and a place on a block of its prompt, in one shard, and the place names the slot."""
    assert sorted(seated.row[seated.row >= 0]) == sorted(rows)
    size, blocks = shape.rows // shards, shape.blocks // shards
    for slot in np.flatnonzero(seated.row >= 0):
        block = slot // size * blocks + seated.block[slot]
        assert seated.prompt[block] == seated.row[slot] // samples
        assert seated.at[block, seated.place[slot]] == slot % size
        if shape.even:
            assert slot == block * shape.group + seated.place[slot]


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
            if arrange(rows, samples, target, 1) is None:
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


def test_a_prompt_with_more_rows_than_a_block_has_places_stands_on_two():
    shape = Shape(6, 9, 3, 3)
    seated = arrange(np.array([0, 1, 2, 3, 5]), 4, shape, 1)
    assert seated.row.tolist() == [0, 1, 2, 3, 5, -1] and seated.prompt.tolist() == [0, 0, 1]
    apart = arrange(np.array([0, 4, 5]), 4, Shape(8, 9, 2, 4), 1)  # a slot for every place: a row sits on its own
    assert apart.row.tolist() == [0, -1, -1, -1, 4, 5, -1, -1]
    assert arrange(np.array([0, 1, 2, 3, 5, 9]), 4, shape, 1) is None  # a fourth block
    assert arrange(np.arange(7), 8, Shape(6, 9, 6, 3), 1) is None  # a seventh slot
    halves = arrange(np.array([0, 1, 2, 5]), 4, Shape(4, 9, 4, 2), 2)
    assert halves.row.tolist() == [0, 1, 2, 5] and halves.prompt.tolist() == [0, -1, 0, 1]
    assert halves.block.tolist() == [0, 0, 0, 1] and halves.place.tolist() == [0, 1, 0, 0]
