"""Contract 3 for ways through the model that the engine's own tests do not take: windows, caps, experts, adapters."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from fast_set import slow_but
from model_cases import FAMILY_CASES, random_model

from grpo_jax import generate
from grpo_jax.models import LoraSpec

PROMPTS = [[5, 6, 7], [8, 9], [9, 10, 11, 12, 4, 4, 5, 6, 7], [3, 3]]
"""One is longer than every window here."""


@pytest.mark.parametrize("family", slow_but(("gemma2", "smollm3"), ("gemma2", "smollm3", "qwen3_moe")))
def test_contract_3_the_samplers_logp_is_the_models(family):
    model, params = random_model(**FAMILY_CASES[family], num_hidden_layers=2)
    if family == "smollm3":
        model = replace(model, lora=LoraSpec(2, 4.0))
        adapters = jax.tree.map(lambda x: x + 0.1, model.init_adapters(0))
        params = model.joined(adapters, params)
    rollout = generate(model, params, PROMPTS, 2, 12, stop_ids=list(range(1, 6)))
    logp = np.asarray(jax.nn.log_softmax(model.logits(params, rollout.tokens)))
    row, column = np.nonzero(rollout.completion_mask)
    assert len(row) > 30
    want = logp[row, column - 1, rollout.tokens[row, column]]
    difference = np.abs(rollout.sampler_logp[row, column] - want)
    assert difference.mean() < 1e-5 and difference.max() < 1e-4
