"""Rows on prompts: stacked and taken apart again nothing is lost, on one shard or several."""

import jax
import numpy as np
import pytest

from grpo_jax.models.seats import Seats
from grpo_jax.rollout.shapes import Shape, arrange

SAMPLES = 4


@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_row_reads_is_of_its_prompt(shards):
    rows, shape = np.array([0, 1, 2, 3, 5, 9, 11]), Shape(8, 9, 6, 3)
    seated = arrange(rows, SAMPLES, shape, shards)
    seats = Seats(6, shards, seated.at, seated.block, seated.place)
    held = seated.row >= 0
    stacked = np.asarray(jax.jit(Seats.stack)(seats, seated.row[:, None]))
    assert stacked.shape == (6, 3, 1)
    assert (np.asarray(jax.jit(Seats.unstack)(seats, stacked))[held, 0] == seated.row[held]).all()
    prompts = np.asarray(seats.spread(seated.prompt, 8))
    assert (prompts[held] == seated.row[held] // SAMPLES).all()
    for prompt, places in zip(seated.prompt, stacked[..., 0], strict=True):
        mine = set(rows[rows // SAMPLES == prompt].tolist())
        assert prompt < 0 or mine & set(places.tolist())


def test_every_place_taken_is_the_order_of_the_rows():
    seats, x = Seats(3), np.arange(12)
    assert seats.stack(x).tolist() == x.reshape(3, 4).tolist()
    assert seats.unstack(seats.stack(x)).tolist() == x.tolist()
    assert seats.spread(np.arange(3), 12).tolist() == np.repeat([0, 1, 2], 4).tolist()
