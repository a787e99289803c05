"""One update on committed tokens gives the loss, gradient norm and log-probability that torch gives.

tests/step_golden.npz is made by scripts/make_step_golden.py, which does not import grpo_jax.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import grpo_jax
from grpo_jax.algo.spec import LossConfig
from grpo_jax.data import resolve_model
from grpo_jax.learner.step import Learner
from grpo_jax.metrics import means
from grpo_jax.types import TrainBatch


@pytest.mark.parametrize("rows", [None, 2])
def test_loss_gradient_norm_and_mean_logp_reproduce(rows):
    golden = np.load(Path(__file__).parent / "step_golden.npz")
    model, params = grpo_jax.load_model(resolve_model("quickstart"))
    tokens, mask = golden["tokens"], golden["mask"]
    column = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    lengths = mask.sum(1) + mask.argmax(1)
    batch = TrainBatch(
        tokens=tokens,
        positions=column,
        segment_ids=(column < lengths[:, None]).astype(np.int32),
        context_ids=None,
        source=np.maximum(column - 1, 0),
        mask=mask,
        advantages=np.broadcast_to(golden["advantages"][:, None], tokens.shape).astype(np.float32),
        sampler_logp=golden["old_logp"].astype(np.float32),
        old_logp=golden["old_logp"].astype(np.float32),
        ref_logp=golden["ref_logp"].astype(np.float32),
    )
    learner = Learner(
        model=model,
        loss=LossConfig.preset("grpo", clip_high=0.28),
        optimizer=optax.sgd(0.0),
        schedule=optax.constant_schedule(0.0),
        scored_len=int(mask.sum(1).max()),
        microbatch_rows=rows,
    )
    logp = np.asarray(learner.logprobs(params, batch))
    _, sums, _ = learner.update(learner.init(params), batch, np.int32(len(tokens)))
    figures = means([jax.device_get(sums)])
    assert logp[mask].mean() == pytest.approx(float(golden["mean_logp"]), rel=1e-4)
    # A loss's count is its microbatch's share of the step's tokens, so the shares add up to the step's loss.
    assert figures["loss"] == pytest.approx(float(golden["loss"]), rel=1e-4)
    assert figures["grad_norm"] == pytest.approx(float(golden["grad_norm"]), rel=1e-4)
