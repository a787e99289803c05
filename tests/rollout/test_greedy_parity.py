"""Greedy completions against transformers' own greedy search, token for token."""

import numpy as np
import pytest

from grpo_jax import generate, load_model
from grpo_jax.testing import tiny_checkpoint

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24]]
FAMILIES = {"qwen2": {}, "llama": {"model_type": "llama"}, "qwen3": {"model_type": "qwen3", "head_dim": 6}}


@pytest.mark.slow  # tests/models/test_greedy_golden.py holds the same without torch
@pytest.mark.torch
@pytest.mark.parametrize("overrides", FAMILIES.values(), ids=FAMILIES)
def test_greedy_is_transformers_greedy(tmp_path, overrides):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory = tiny_checkpoint(tmp_path / "model", **overrides)
    model, params = load_model(directory)
    rollout = generate(model, params, PROMPTS, 1, 40, temperature=0.0, stop_ids=[1])
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    lengths = set()
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, eos_token_id=1, pad_token_id=0
        )
        expected = out[0, len(prompt) :].tolist()
        assert rollout.completion_ids(n) == expected
        lengths.add(len(expected))
    assert max(lengths) > 5 and np.isfinite(rollout.sampler_logp).all()
