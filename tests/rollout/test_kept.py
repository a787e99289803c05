"""How keys and values are kept and read: nothing of slots is seen through it, and what it costs is bounded."""

from dataclasses import replace

import numpy as np
import pytest
from test_engine import completions, learner_logp

from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt

ASKED = [Prompt(i, tuple(p)) for i, p in enumerate([[5, 6, 7], [8], [9, 10, 11, 12, 13], [3, 3], [20, 21, 22]])]
CALL = {"num_samples": 4, "sampling": Sampling(max_new_tokens=70, stop_ids=(1,)), "seed": 0, "step": 0}


@pytest.mark.parametrize(
    ("kept", "least", "most"), [("int8", 1e-4, 2e-2), pytest.param("bfloat16", 2e-5, 1e-2, marks=pytest.mark.slow)]
)
def test_contract_4_holds_with_rounded_keys_and_values(kept, least, most):
    """The rounding is a row's own: float noise moves a number over its edge now and then, neighbours do not."""
    model, params = tiny_model(num_hidden_layers=1)
    rounded = replace(model, kv_dtype=kept)
    one, two = (ContinuousEngine(rounded, 16, slots).generate(params, ASKED, **CALL) for slots in (None, 8))
    same = [a == b for a, b in zip(completions(one), completions(two), strict=True)]
    assert np.mean(same) > 0.8
    apart = np.abs(one.sampler_logp - two.sampler_logp)[same]
    assert apart.mean() < 1e-4 and apart.max() < 1e-2
    gap = np.abs(learner_logp(model, params, one, 1.0) - one.sampler_logp)[one.completion_mask]
    assert gap.size > 500 and least < gap.mean() < most


@pytest.mark.parametrize("slots", [None, 6])
def test_every_way_to_read_samples_the_same(slots):
    """Over several segments, with rows abreast and with rows that others follow; each agrees with the learner."""
    model, params = tiny_model(num_hidden_layers=1)
    limits = np.random.default_rng(0).integers(1, 150, 12)
    call = {"num_samples": 4, "sampling": Sampling(max_new_tokens=150), "seed": 0, "step": 0, "limits": limits}
    made = [ContinuousEngine(replace(model, attention=x), 16, slots) for x in ("dense", "ragged", "buffered")]
    assert made[0].shapes(3, 4, 150).refill == (slots is not None)
    one, *others = rollouts = [engine.generate(params, ASKED[:3], **call) for engine in made]
    for other in others:
        same = [a == b for a, b in zip(completions(one), completions(other), strict=True)]
        assert np.mean(same) > 0.8 and (one.completion_len == limits).all()
        assert np.abs(one.sampler_logp - other.sampler_logp)[same].max() < 1e-4
    for rollout in rollouts:
        gap = np.abs(learner_logp(model, params, rollout, 1.0) - rollout.sampler_logp)[rollout.completion_mask]
        assert gap.mean() <= 1e-5 and gap.max() <= 1e-4
