"""Prompts that do not divide the devices: the rows of one lie on several, and no device decodes rows for nothing."""

import jax
import numpy as np
import pytest
from fast_set import slow_but
from test_engine import assert_same_but_for_boundaries

from grpo_jax.mesh import make_mesh
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt

VOCAB = 97
ASKED = [Prompt(i, tuple(range(2 + i, 9 + 3 * i))) for i in range(3)]


@pytest.mark.parametrize(("prompts", "samples", "rows"), slow_but({(3, 5, 16)}, [(1, 8, 8), (3, 5, 16), (3, 16, 48)]))
def test_rows_of_a_prompt_lie_on_several_devices(prompts, samples, rows):
    asked = {"num_samples": samples, "sampling": Sampling(max_new_tokens=10, stop_ids=(1, 5)), "seed": 0, "step": 0}
    results = []
    for count in (1, 8):
        model, params = tiny_model(make_mesh(count, devices=jax.devices()[:count]), vocab_size=VOCAB, dtype="float32")
        engine = ContinuousEngine(model, 16, slots=prompts * samples)
        call = engine.stream(params, ASKED[:prompts], **asked)
        for _ in call:
            pass
        assert not engine.shapes(prompts, samples, 10).refill
        results.append(call.sampled.rollout(np.arange(prompts * samples)))
    assert engine.shapes(prompts, samples, 10).slots == call.counts.shapes[0].rows == rows
    assert_same_but_for_boundaries(model, params, results[0], results[1], range(prompts), samples)
