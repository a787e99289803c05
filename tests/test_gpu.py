"""What only a GPU can show: `JAX_PLATFORMS=cuda pytest -m gpu`. Skipped where jax sees none."""

import dataclasses

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.config import TrainConfig
from grpo_jax.metrics import read_json_lines
from grpo_jax.models.decode_attention import READERS
from grpo_jax.testing import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="jax sees no GPU; JAX_PLATFORMS=cuda asks for one"),
]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [3, 3]]


def gap(model, params, rollout):
    """|sampler - learner| of every sampled token."""
    logp = np.asarray(jax.nn.log_softmax(model.logits(params, rollout.tokens).astype(np.float32)))
    logp = np.pad(np.take_along_axis(logp[:, :-1], rollout.tokens[:, 1:, None], -1)[..., 0], ((0, 0), (1, 0)))
    return np.abs(logp - rollout.sampler_logp)[rollout.completion_mask]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_contract_3_in_float32_the_sampler_agrees_with_the_learner(family):
    model, params = tiny_model(model_type=family, head_dim=8)
    found = gap(model, params, grpo_jax.generate(model, params, PROMPTS, 8, 32, stop_ids=[1]))
    assert found.mean() <= 1e-5 and found.max() <= 1e-4


@pytest.mark.parametrize("attention", sorted(READERS))
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_every_way_to_read_the_cache_agrees_with_the_learner(attention, dtype, most):
    tiny, params = tiny_model(dtype=dtype, scale=3.0)
    model = dataclasses.replace(tiny, attention=attention)
    found = gap(model, params, grpo_jax.generate(model, params, PROMPTS, 4, 200, stop_ids=[1]))
    assert 0 < found.mean() <= most and len(found) > 500


def test_contract_4_the_same_call_twice_gives_the_same_bits():
    model, params = tiny_model()
    one, two = (grpo_jax.generate(model, params, PROMPTS, 8, 32, stop_ids=[1], seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.sampler_logp, two.sampler_logp)


def test_logits_equal_the_cpus():
    model, params = tiny_model()
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    ours = np.asarray(model.logits(params, tokens))
    with jax.default_device(jax.devices("cpu")[0]):
        from grpo_jax.mesh import make_mesh

        there = tiny_model(make_mesh(1, 1, 1, devices=jax.devices("cpu")[:1]))[0]
        copied = jax.device_put(jax.device_get(params), there.param_shardings)
        expected = np.asarray(there.logits(copied, tokens))
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_quickstart_learns(tmp_path, dtype):
    tables = {
        "steps": 40,
        "output_dir": str(tmp_path / "run"),
        "rollout": {"max_new_tokens": 32},
        "algorithm": {"preset": "bnpo", "loss": {"correction": "tis"}},
        "model": {"dtype": dtype},
        "optim": {"learning_rate": 1e-4, "schedule": "linear"},
        "eval": {"every": None, "prompts": 256},
        "log": {"quiet": True},
    }
    summary = grpo_jax.Trainer(config=TrainConfig.from_tables(tables)).train()
    assert summary["accuracy_last"] > summary["accuracy_first"] + 0.3
    gaps = [r for r in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "sampler_logp_difference/mean" in r]
    if dtype == "float32":
        assert max(r["sampler_logp_difference/max"] for r in gaps) <= 1e-4
