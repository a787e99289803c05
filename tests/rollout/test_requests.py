"""What is asked of an engine and what is kept of a row, without an engine."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.rollout.requests import Sampled, requests
from grpo_jax.rollout.slots import Rows, _record
from grpo_jax.types import Prompt

ASKED = requests([Prompt(2**40 + 7, (5, 6, 7)), Prompt(3, (8,))], 2, 4, 6, seed=9, seeds=None, limits=[6, 2, 6, 6])


def test_a_row_is_addressed_by_seed_request_id_and_sample_never_by_its_place():
    ids = [[2**8, 7], [2**8, 7], [0, 3], [0, 3]]
    np.testing.assert_array_equal(ASKED.address, [[9, *halves, n % 2] for n, halves in enumerate(ids)])
    assert ASKED.last.tolist() == [7, 8] and ASKED.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]


def test_a_completion_lies_behind_its_prompt_and_its_finish_is_what_was_seen():
    sampled = Sampled(ASKED, 6, changed=False)
    ends = [([11, 12], False), ([13, 1], True), ([14] * 6, True), ([15] * 6, False)]
    for row, (tokens, stopped) in enumerate(ends):
        sampled.put(row, np.array(tokens), np.full(len(tokens), -0.5, np.float32), None, stopped)
    rollout = sampled.rollout(np.arange(4))
    assert rollout.finish.tolist() == ["length", "stop", "stop", "length"]  # the second and third at their limits
    assert rollout.tokens[1].tolist() == [5, 6, 7, 13, 1, 0, 0, 0, 0, 0]
    assert rollout.tokens[3].tolist() == [8, *[15] * 6, 0, 0, 0]
    assert rollout.sampler_logp[1].tolist() == [0, 0, 0, -0.5, -0.5, 0, 0, 0, 0, 0]


def test_what_a_row_that_is_done_draws_is_not_kept():
    length = jnp.array([1, 2, 1, 0], jnp.int32)
    empty = jnp.zeros((4, 3))
    limit, keys = jnp.array([3, 2, 2, 3], jnp.int32), jnp.zeros((4, 2), jnp.uint32)
    rows = Rows(jnp.zeros(4, jnp.int32), length, limit, jnp.zeros(4, bool), keys, empty.astype(jnp.int32), empty, None)
    live = jnp.array([True, False, True, True])
    drawn = jnp.array([4, 1, 5, 1], jnp.int32), jnp.full(4, -0.5), None
    after, goes_on = jax.jit(_record)(rows, live, drawn, jnp.array([1], jnp.int32))
    assert goes_on.tolist() == [True, False, False, False]
    assert after.stopped.tolist() == [False, False, False, True] and after.length.tolist() == [2, 2, 2, 1]
    assert after.tokens.tolist() == [[0, 4, 0], [0, 0, 0], [0, 5, 0], [1, 0, 0]]
    assert after.logp.tolist() == [[0, -0.5, 0], [0, 0, 0], [0, -0.5, 0], [-0.5, 0, 0]]
