"""The learner against contracts 1, 5, 7, 8 and 11: one gradient per optimizer step, however it is cut."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.algo.spec import PRESETS, LossConfig
from grpo_jax.batching import layout_for, pack
from grpo_jax.config import OptimConfig
from grpo_jax.learner.optimizer import apply, learning_rate, make_optimizer, round_at_random
from grpo_jax.learner.step import Learner
from grpo_jax.mesh import batch_sharding, make_mesh
from grpo_jax.metrics import CompileLog, means
from grpo_jax.rollout import generate
from grpo_jax.testing import tiny_model
from grpo_jax.types import TrainState

PROMPTS = [[5, 6, 7], [8, 9], [9, 10, 11, 12], [3, 3]]
LIMIT, WIDTH = 8, 16 + 8
OPTIM = OptimConfig(learning_rate=0.01, max_grad_norm=None)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(scope="module")
def rollout(tiny):
    return generate(*tiny, PROMPTS, 4, LIMIT, stop_ids=list(range(1, 12)))


ADVANTAGES = np.random.default_rng(0).standard_normal(16).astype(np.float32)
WAVE = np.sin(np.arange(16 * WIDTH, dtype=np.float32)).reshape(16, WIDTH) * 0.05
"""Moves the old policy off the new one, so that every branch of the loss matters."""


@functools.cache
def learner_for(model, loss: LossConfig, kind: str = "padded", rows: int | None = None, optim=OPTIM) -> Learner:
    return Learner(
        model=model,
        loss=loss,
        optimizer=optax.chain(optax.sgd(1.0)) if optim is None else make_optimizer(optim, 10, model.decay_mask),
        schedule=learning_rate(optim or OPTIM, 10),
        scored_len=2 * WIDTH if kind == "packed" else LIMIT,
        microbatch_rows=rows,
        segmented=kind != "padded",
    )


def batch_for(rollout, kind: str = "padded", multiple: int = 1, mesh=None, mask=None):
    layout = layout_for(kind, WIDTH - LIMIT, LIMIT, len(rollout.tokens), 4, multiple)
    batch = pack(rollout, ADVANTAGES, rollout.completion_mask if mask is None else mask, layout)
    return batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))


def loss_of(preset: str) -> LossConfig:
    over = {"max_completion_len": LIMIT} if preset == "dr_grpo" else {}
    return replace(PRESETS[preset].loss, kl_coef=0.1 if preset == "grpo" else 0.0, **over)


def gradient(model, params, rollout, preset="grpo", kind="padded", rows=None, order=None, mesh=None):
    """The update under plain gradient descent, so that the parameters tell the gradient; and its figures."""
    learner = learner_for(model, loss_of(preset), kind, rows, optim=None)
    multiple = rows or (1 if mesh is None else mesh.size // mesh.shape["tensor"])
    batch = batch_for(rollout, kind, multiple, mesh)
    moved = replace(rollout, sampler_logp=rollout.sampler_logp + WAVE)
    old_logp = batch_for(moved, kind, multiple, mesh).sampler_logp
    reference = 2 * batch.sampler_logp - old_logp if preset == "grpo" else None
    batch = replace(batch, old_logp=old_logp, ref_logp=reference)
    if order is not None:
        batch = jax.tree.map(lambda x: x[order], batch)
    state, sums, _ = learner.update(learner.init(jax.tree.map(jnp.copy, params)), batch, np.int32(16))
    return jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), params, state.params), means([jax.device_get(sums)])


def assert_close(one, other, tolerance=2e-5):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(one))
    assert scale > 1e-4
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * scale)


CUTS = {
    "microbatches": {"rows": 4, "order": np.random.default_rng(1).permutation(16)},
    "packed": {"kind": "packed", "rows": 2},
    "group": {"kind": "group"},
    "group in microbatches": {"kind": "group", "rows": 2, "order": np.array([3, 0, 2, 1])},
}
FAST = {("grpo", "microbatches"), ("grpo", "group in microbatches"), ("gspo", "packed")}


@pytest.mark.parametrize(
    ("preset", "cut"),
    [
        pytest.param(preset, cut, marks=[] if (preset, cut) in FAST else pytest.mark.slow)
        for preset in ("grpo", "gspo")
        for cut in CUTS
    ],
)
def test_contract_5_microbatches_packing_and_row_order(tiny, rollout, preset, cut):
    model, params = tiny
    whole, figures = gradient(model, params, rollout, preset)
    parts, same = gradient(model, params, rollout, preset, **CUTS[cut])
    assert_close(whole, parts)
    assert same["loss"] == pytest.approx(figures["loss"], abs=1e-5)
    assert same["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-4)
    assert same["entropy"] == pytest.approx(figures["entropy"], rel=1e-4)
    assert same["sampler_logp_difference/mean"] == pytest.approx(figures["sampler_logp_difference/mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "kind", "rows"),
    [
        pytest.param((8, 1, 1), "padded", 8, marks=pytest.mark.slow),
        ((2, 4, 1), "padded", None),
        pytest.param((2, 2, 2), "padded", None, marks=pytest.mark.slow),
        ((2, 2, 2), "group", None),
    ],
)
def test_contract_5_eight_devices_give_the_gradient_of_one(tiny, rollout, sizes, kind, rows):
    model, params = tiny
    mesh = make_mesh(*sizes)
    spread, spread_params = tiny_model(mesh)
    shards = sizes[0] * sizes[1]
    shape = (16 // shards, WIDTH) if kind == "padded" else (4 // shards, 2 * WIDTH)
    assert batch_for(rollout, kind, shards, mesh).tokens.addressable_shards[0].data.shape == shape
    one, figures = gradient(model, params, rollout)
    many, same = gradient(spread, spread_params, rollout, kind=kind, rows=rows, mesh=mesh)
    assert_close(one, many)
    assert same["loss"] == pytest.approx(figures["loss"], abs=1e-5)


def test_optimizer_moments_are_sharded_like_their_parameters(rollout):
    mesh = make_mesh(1, 4, 2)
    model, params = tiny_model(mesh)
    learner = learner_for(model, loss_of("dapo"))
    state, _, _ = learner.update(learner.init(params), batch_for(rollout, mesh=mesh), np.int32(16))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    weights = 2 * jax.tree.leaves(state.params)
    for moment, weight in zip(moments, weights, strict=True):
        assert moment.addressable_shards[0].data.shape == weight.addressable_shards[0].data.shape
    assert sum(weight.addressable_shards[0].data.size < weight.size for weight in weights) >= 2 * 8


@pytest.mark.parametrize("kind", ["padded", "packed", "group"])
def test_contract_1_each_row_kind_gives_the_samplers_logp(tiny, rollout, kind):
    model, params = tiny
    batch = batch_for(rollout, kind)
    logp = np.asarray(learner_for(model, loss_of("dapo"), kind).logprobs(params, batch))
    gap = np.abs(logp - batch.sampler_logp)[batch.mask]
    assert gap.size == rollout.completion_len.sum() and gap.mean() <= 1e-5 and gap.max() <= 1e-4
    assert (logp[~batch.mask] == 0).all()


def test_log_probabilities_are_of_the_distribution_that_is_sampled(tiny, rollout):
    model, params = tiny
    batch = batch_for(rollout)
    logp = replace(learner_for(model, loss_of("dapo")), temperature=0.5).logprobs(params, batch)
    tempered = jax.nn.log_softmax(model.logits(params, batch.tokens) / 0.5)[:, :-1]
    expected = np.take_along_axis(np.asarray(tempered), batch.tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(logp[:, 1:], np.where(batch.mask[:, 1:], expected, 0), atol=1e-5)


def test_training_on_the_sampling_weights_needs_no_old_logp(tiny, rollout):
    model, params = tiny
    learner = learner_for(model, loss_of("dapo"), optim=None)
    batch = batch_for(rollout)
    annotated = replace(batch, old_logp=batch.sampler_logp)
    copies = [jax.tree.map(jnp.copy, params) for _ in range(2)]
    without, figures, _ = learner.update(learner.init(copies[0]), batch, np.int32(16))
    with_old, _, _ = learner.update(learner.init(copies[1]), annotated, np.int32(16))
    for a, b in zip(jax.tree.leaves(without.params), jax.tree.leaves(with_old.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert means([jax.device_get(figures)])["ratio"] == 1.0


@pytest.mark.parametrize("weight_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_contract_7_an_all_masked_batch_changes_nothing(tiny, rollout, weight_decay):
    model, params = tiny
    learner = learner_for(model, loss_of("grpo"), optim=OptimConfig(weight_decay=weight_decay))
    batch = batch_for(rollout, mask=np.zeros_like(rollout.completion_mask))
    batch = replace(batch, ref_logp=jnp.zeros(batch.mask.shape))
    state = learner.init(jax.tree.map(jnp.copy, params))
    before = jax.tree.map(np.array, state)
    after, sums, _ = learner.update(state, batch, np.int32(16))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert means([jax.device_get(sums)])["skipped_update_count"] == 1 and int(after.step) == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_skipped_inside_jit(tiny, rollout, poison):
    model, params = tiny
    learner = learner_for(model, loss_of("dapo"))
    batch = batch_for(rollout)
    bad = replace(batch, advantages=np.where(batch.mask, poison, 0).astype(np.float32))
    state = learner.init(jax.tree.map(jnp.copy, params))
    before = jax.tree.map(np.array, state)
    after, sums, _ = learner.update(state, bad, np.int32(16))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert means([jax.device_get(sums)])["skipped_update_count"] == 1
    again, _, _ = learner.update(after, batch, np.int32(16))
    assert int(again.step) == 1


def test_contract_8_other_values_compile_nothing_new(tiny, rollout):
    model, params = tiny
    learner = learner_for(model, loss_of("dapo"))
    state = learner.init(jax.tree.map(jnp.copy, params))
    batch = batch_for(rollout)
    state, _, _ = learner.update(state, batch, np.int32(16))
    with CompileLog() as compiles:
        for i in range(3):
            other = replace(batch, tokens=batch.tokens[::-1].copy(), advantages=batch.advantages * i)
            state, _, _ = learner.update(state, other, np.int32(16))
    assert compiles.count == 0 and int(state.step) == 4


def test_contract_11_bfloat16_parameters_keep_float32_losses(rollout):
    model, params = tiny_model(dtype="bfloat16", param_dtype="bfloat16")
    learner = learner_for(model, loss_of("dapo"))
    batch = batch_for(rollout)
    logp = learner.logprobs(params, batch)
    state, sums, _ = learner.update(learner.init(params), batch, np.int32(16))
    assert logp.dtype == jnp.float32 and sums["loss"][0].dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.params))
    assert np.isfinite(means([jax.device_get(sums)])["grad_norm"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.0, 0.5, 1, 1, 1]), ("linear", [0.0, 0.5, 1, 0.5, 0]), ("cosine", [0.0, 0.5, 1, 0.5, 0])],
)
def test_schedules_rise_and_end_with_the_run(schedule, expected):
    rate = learning_rate(OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4), 12)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 8, 12)], expected, atol=1e-6)


def test_weight_decay_and_clip_act_as_named(tiny, rollout):
    model, params = tiny
    batch = batch_for(rollout)
    still = replace(batch, advantages=np.zeros_like(batch.advantages))
    decayed = learner_for(model, loss_of("dapo"), optim=OptimConfig(learning_rate=0.1, weight_decay=0.5))
    state, _, _ = decayed.update(decayed.init(jax.tree.map(jnp.copy, params)), still, np.int32(16))
    for before, after, matrix in zip(
        *(jax.tree.leaves(x) for x in (params, state.params, model.decay_mask)), strict=True
    ):
        np.testing.assert_allclose(after, before * (0.95 if matrix else 1.0), rtol=1e-5)
    clipped = learner_for(model, loss_of("dapo"), optim=None)
    clipped = replace(clipped, optimizer=optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)))
    state, _, _ = clipped.update(clipped.init(jax.tree.map(jnp.copy, params)), batch, np.int32(16))
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, params, state.params))
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_updates_below_a_step_of_bfloat16_add_up_and_the_same_ones_come_again():
    optimizer, zeros = optax.sgd(1.0), {"w": jnp.zeros(4096)}
    still = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), zeros)
    start = TrainState({"w": jnp.ones(4096, jnp.bfloat16)}, optimizer.init(zeros), jnp.zeros((), jnp.int32))

    @jax.jit
    def after_100(state, grad, whose):
        fine = jnp.asarray(True)
        step = lambda _, s: apply(optimizer, s, {"w": jnp.full(4096, grad)}, fine, still, (3, whose))  # noqa: E731
        return jax.lax.fori_loop(0, 100, step, state).params["w"]

    down = after_100(start, 1e-4, 1)  # a fortieth of the step below 1, which rounding to the nearest would lose
    assert down.dtype == jnp.bfloat16 and abs(float(down.astype(jnp.float32).mean()) - 0.99) < 1e-3
    assert float(down.astype(jnp.float32).std()) < 0.02, "each step draws anew; else a few have all the steps"
    np.testing.assert_array_equal(down, after_100(start, 1e-4, 1))
    assert (down != after_100(start, 1e-4, 2)).any()
    np.testing.assert_array_equal(after_100(start, 0.0, 1), start.params["w"])


def test_rounding_at_random_takes_a_neighbour_and_leaves_what_fits():
    x = jnp.array([1.0, -2.5, 0.0, jnp.inf, -jnp.inf, jnp.nan, 1 + 2**-9, -(1 + 2**-9)], jnp.float32)
    many = jnp.broadcast_to(x, (400, 8))
    (each,) = round_at_random([many], [many.astype(jnp.bfloat16)], jax.random.key(0))
    each = each.astype(jnp.float32)
    np.testing.assert_array_equal(each[:, :6], many[:, :6])
    assert set(np.unique(each[:, 6])) == {1.0, 1 + 2**-7} and abs(float((each[:, 6] > 1).mean()) - 0.25) < 0.1
    assert set(np.unique(each[:, 7])) == {-1.0, -(1 + 2**-7)}
