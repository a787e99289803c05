"""The load-balance loss in an update: the same however the step is cut, and what it adds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.algo.spec import LossConfig
from grpo_jax.learner.step import Learner
from grpo_jax.models import balance_loss, router_metrics
from grpo_jax.testing import tiny_model
from grpo_jax.types import TrainBatch

EXPERTS = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 1,
    "norm_topk_prob": True,
}
N, T = 4, 9


@pytest.fixture(scope="module")
def experts():
    return tiny_model(**EXPERTS)


def _batch():
    rng = np.random.default_rng(0)
    columns = np.broadcast_to(np.arange(T, dtype=np.int32), (N, T))
    lengths = np.array([9, 6, 8, 5])[:, None]
    return TrainBatch(
        tokens=rng.integers(0, 61, (N, T)).astype(np.int32),
        positions=columns,
        segment_ids=(columns < lengths).astype(np.int32),
        context_ids=None,
        source=np.maximum(columns - 1, 0),
        mask=(columns >= 3) & (columns < lengths),
        advantages=rng.standard_normal((N, T)).astype(np.float32),
        sampler_logp=np.zeros((N, T), np.float32),
    )


def _update(experts, rows, coef):
    model, params = experts
    learner = Learner(
        model=model,
        loss=LossConfig(),
        optimizer=optax.sgd(1.0),
        schedule=lambda count: 1.0,
        scored_len=T,
        microbatch_rows=rows,
        router_coef=coef,
    )
    batch = jax.tree.map(jnp.asarray, _batch())
    state, sums, maxima = learner.update(learner.init(params), batch, np.int32(N))
    return jax.tree.map(lambda new, old: np.asarray(new - old), state.params, params), sums, maxima


def test_contract_5_the_load_is_the_whole_steps(experts):
    whole, sums, maxima = _update(experts, None, 0.5)
    cut, again, _ = _update(experts, 1, 0.5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        assert np.abs(one - other).max() < 1e-5 * scale
    total, count = sums["router/balance"]
    assert count == _batch().mask.sum() and abs(float(total - again["router/balance"][0])) < 1e-4 * total
    assert 1.0 <= maxima["router/busiest"] <= 4.0 and 0 <= maxima["router/unused"] < 1
    without, plain, _ = _update(experts, None, 0.0)
    moved = lambda tree: tree["layers"]["0.0"]["mlp"]["router"]["kernel"]  # noqa: E731
    assert np.abs(moved(whole) - moved(without)).max() > 1e-2 * scale
    assert "router/balance" not in plain


def test_an_even_load_has_the_least_loss():
    probs, even = jnp.full((1, 3, 4), 0.25), jnp.full((2, 4), 1.5)
    np.testing.assert_allclose(balance_loss(probs, even, jnp.int32(3)), np.full((1, 3), 2.0), rtol=1e-6)
    busy = jnp.array([[3.0, 3.0, 0.0, 0.0]] * 2)
    tilted = jnp.broadcast_to(jnp.array([0.4, 0.4, 0.1, 0.1]), (1, 3, 4))
    assert (balance_loss(tilted, busy, jnp.int32(3)) > 2.5).all()
    figures = router_metrics(busy)
    assert (figures["router/busiest"], figures["router/unused"]) == (2.0, 0.5)
