"""Edges of the loss, each by its name: bounds, ties, clamps, empty steps, and NaN where nothing is trained."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo

from .cases import assert_close, make_step, x64
from .test_contract5 import CONFIGS, count_step, every_config, loss_and_gradient
from .test_reference_loss import DRAWS, slow_step

INPUTS = ("logp", "old_logp", "advantages", "ref_logp", "sampler_logp", "entropy")


def arrays_of(step, dtype=jnp.float32):
    """The step's arrays as policy_loss takes them."""
    values = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if f.name != "draws"}
    present = {k: v for k, v in values.items() if v is not None}
    return {k: jnp.asarray(v, dtype if v.dtype == np.float64 else None) for k, v in present.items()}


def evaluate(config, arrays):
    """(loss, gradient in logp, gradient in entropy) as NumPy, the metrics' finiteness checked."""
    value, grads, metrics = loss_and_gradient(config, arrays)
    assert all(np.isfinite(np.asarray(pair)).all() for pair in metrics.values())
    return np.asarray(value), *(np.asarray(g) for g in grads)


@pytest.mark.parametrize("packed", [False, True])
@every_config
def test_nothing_masked_is_read(name, packed):
    """Bit for bit the same loss and gradient when the masked positions of every input hold NaN and infinities."""
    clean = make_step(2, (5, 7), packed=packed)
    clean.mask[2] = False
    rng, spoiled = np.random.default_rng(0), {}
    for field in INPUTS:
        x = getattr(clean, field).copy()
        untrained = ~clean.mask if x.ndim == 2 else ~clean.mask.any(axis=1)
        x[untrained] = rng.choice([np.nan, np.inf, -np.inf], untrained.sum())
        spoiled[field] = x
    expected = evaluate(CONFIGS[name], arrays_of(clean))
    got = evaluate(CONFIGS[name], arrays_of(dataclasses.replace(clean, **spoiled)))
    for g, e in zip(got, expected, strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_array_equal(g, e)
    assert (got[1][~clean.mask] == 0).all() and (got[2][~clean.mask] == 0).all() and (got[1] != 0).any()


@pytest.mark.parametrize("packed", [False, True])
@every_config
def test_nothing_trained_is_exactly_nothing(name, packed):
    step = make_step(3, (5, 7), packed=packed, masked="all")
    spoiled = step.map(lambda x: np.full_like(x, np.nan) if x.dtype == np.float64 else x)
    for out in evaluate(CONFIGS[name], arrays_of(spoiled)):
        assert (out == 0).all()


@pytest.mark.parametrize("name", ["sequence level with everything", "clip_cov", "kl_cov", "entropy_top"])
def test_padding_is_not_trained_whatever_the_mask_says(name):
    """A packed row's padding, segment 0, under a mask that is True there: the same as under one that is not."""
    config, step = CONFIGS[name], make_step(4, (5, 7), packed=True)
    padding = step.segments == 0
    assert padding.any() and not step.mask[padding].any()
    wide = dataclasses.replace(step, mask=step.mask | padding)
    for g, e in zip(evaluate(config, arrays_of(wide)), evaluate(config, arrays_of(step)), strict=True):
        np.testing.assert_array_equal(g, e)
    counted = [count_step(config, arrays_of(each)) for each in (wide, step)]
    assert jax.tree.map(float, counted[0]) == jax.tree.map(float, counted[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
@every_config
def test_one_row_or_one_token(name, shape):
    step = make_step(11, shape, masked="none").cast(np.float32)
    got, expected = evaluate(CONFIGS[name], arrays_of(step)), slow_step(step, CONFIGS[name], DRAWS[shape])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 3e-5)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@every_config
def test_log_ratios_of_ten_thousand(name, sign):
    """Finite in float32, and what the reference gives in float64."""
    step = make_step(5, (5, 7))
    far = {
        "old_logp": step.logp - sign * 1e4,
        "ref_logp": step.logp + sign * 1e4,
        "sampler_logp": step.logp - sign * 2e4,
    }
    step = dataclasses.replace(step, **far).cast(np.float32)
    got, expected = evaluate(CONFIGS[name], arrays_of(step)), slow_step(step, CONFIGS[name], DRAWS[(5, 7)])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 1e-4)


@every_config
def test_advantages_of_ten_to_the_thirty(name):
    step = make_step(6, (5, 7))
    huge = dataclasses.replace(step, advantages=np.sign(step.advantages) * 1e30)
    for out in evaluate(CONFIGS[name], arrays_of(huge)):
        assert np.isfinite(out).all()


def one_token(config, log_ratio, advantage, **more):
    """Loss and gradient in logp of one token whose logp is log_ratio and whose old_logp is 0, in float64."""
    with x64():
        given = {k: jnp.full((1, 1), v) for k, v in more.items()}
        main = (jnp.zeros((1, 1)), jnp.full(1, float(advantage)), jnp.ones((1, 1), bool))
        loss = lambda x: algo.policy_loss(x, *main, config, **given)[0]  # noqa: E731
        value, slope = jax.value_and_grad(loss)(jnp.full((1, 1), float(log_ratio)))
        return float(value), float(slope[0, 0])


RATIO_SURROGATES = [
    ("ppo_clip", "token"),
    ("ppo_clip", "sequence"),
    ("ppo_clip", "sequence_token"),
    ("kl_cov", "token"),
]


@pytest.mark.parametrize("advantage", [-2.0, 3.0])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_at_a_tie_with_the_bound_the_unclipped_branch_has_the_gradient(level, advantage):
    tight = algo.LossConfig(ratio_level=level, clip_low=0.0, clip_high=0.0)
    assert one_token(tight, 0.0, advantage) == (-advantage, -advantage)
    inward = math.copysign(1e-3, -advantage)
    assert one_token(tight, inward, advantage)[1] == pytest.approx(-advantage * math.exp(inward), rel=1e-12)
    assert one_token(tight, -inward, advantage) == (-advantage, 0.0)


def test_the_clamp_at_twenty():
    """At 20 exactly the gradient is still there; beyond it is 0 and the value stays."""
    free = algo.LossConfig(clip_low=None, clip_high=None)
    edge = math.exp(20.0)
    assert one_token(free, 20.0, 1.0) == pytest.approx((-edge, -edge), rel=1e-12)
    assert one_token(free, 20.5, 1.0) == pytest.approx((-edge, 0.0), rel=1e-12)
    assert one_token(free, -20.5, 1.0) == pytest.approx((-math.exp(-20.0), 0.0), rel=1e-12)


def test_delta_caps_the_unclipped_branch():
    """Only where A < 0: there the ratio has no other upper bound."""
    config = algo.LossConfig(clip_low=0.2, clip_high=0.2, delta=4.0)
    assert one_token(config, math.log(3.0), -1.0) == pytest.approx((3.0, 3.0), rel=1e-12)
    assert one_token(config, math.log(5.0), -1.0) == pytest.approx((4.0, 0.0), rel=1e-12)
    assert one_token(config, math.log(5.0), 1.0) == pytest.approx((-1.2, 0.0), rel=1e-12)
    assert one_token(config, math.log(0.5), -1.0) == pytest.approx((0.8, 0.0), rel=1e-12)


@pytest.mark.parametrize("log_ratio", [-30.0, -0.1, 0.0, 0.3, math.log(3.0), 2.0, 30.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_dual_clip_and_delta_of_the_same_size_are_equal(log_ratio, advantage):
    dual = one_token(algo.LossConfig(dual_clip=3.0), log_ratio, advantage)
    assert dual == pytest.approx(one_token(algo.LossConfig(delta=3.0), log_ratio, advantage), rel=1e-12, abs=0)


def test_absolute_values_have_no_slope_at_zero():
    config = algo.LossConfig(kl_coef=1.0, kl_estimator="abs")
    assert one_token(config, 0.0, 0.0, ref_logp=0.0) == (0.0, 0.0)
    assert one_token(algo.LossConfig(surrogate="kl_cov", kl_cov_share=1.0), 0.0, 2.0) == (-2.0, -2.0)


@pytest.mark.parametrize("x", [1e-8, 1e-6, 1e-4, 1e-3, 0.5, -1e-6, -1e-4, -0.5])
def test_k3_of_small_differences_keeps_its_digits(x):
    """exp(x) - x - 1 would be 0 or negative in float32."""
    config = algo.LossConfig(kl_coef=1.0, kl_estimator="k3")
    ref = jnp.full((1, 1), x, jnp.float32)
    main = (jnp.zeros((1, 1)), jnp.zeros(1), jnp.ones((1, 1), bool), config)
    loss = lambda p: algo.policy_loss(p, *main, ref_logp=ref)[0]  # noqa: E731
    value, slope = jax.value_and_grad(loss)(jnp.zeros((1, 1)))
    exact = float(np.float32(x))
    assert float(value) >= 0
    assert float(value) == pytest.approx(math.expm1(exact) - exact, rel=1e-3, abs=abs(exact) * 1e-7)
    assert float(slope[0, 0]) == pytest.approx(-math.expm1(exact), rel=1e-5)


def test_k3_far_from_the_reference():
    """Up to 20 the gradient pulls towards the reference; beyond it stops and never turns round."""
    config = algo.LossConfig(kl_coef=1.0, kl_estimator="k3")
    slope = lambda x: one_token(config, -x, 0.0, ref_logp=0.0)[1]  # noqa: E731
    assert slope(19.0) == pytest.approx(-math.expm1(19.0), rel=1e-12)
    assert slope(21.0) == 0.0 and slope(1e4) == 0.0
    assert slope(-1e4) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("over", "weight"),
    [
        ({"correction": "tis"}, {0.1: 0.1, 1.0: 1.0, 1.9: 1.9, 2.1: 2.0, 8.0: 2.0}),
        ({"correction": "tis", "correction_low": 0.5}, {0.1: 0.5, 1.0: 1.0}),
        ({"correction": "icepop"}, {0.1: 0.0, 0.49: 0.0, 0.51: 0.51, 4.9: 4.9, 5.1: 0.0}),
        ({"correction": "seq_tis"}, {0.1: 0.1, 2.9: 2.9, 3.1: 3.0}),
        ({"correction": "seq_mask"}, {1e-3: 1e-3, 2.9: 2.9, 3.1: 0.0}),
        ({"correction": "geo_mask", "correction_low": 0.5, "correction_high": 2.0}, {0.1: 0.0, 1.0: 1.0, 8.0: 0.0}),
        ({"correction": "geo_tis", "correction_high": 2.0}, {0.1: 0.1, 8.0: 2.0}),
        ({"correction": "geo_gate"}, {0.9989: 0.0, 0.9991: 0.9991, 1.0019: 1.0019, 1.0021: 0.0}),
        ({"veto": 0.2}, {0.1: 0.0, 1.0: 1.0, 8.0: 1.0}),
        ({"correction": "tis", "veto": 0.2}, {0.1: 0.0, 8.0: 2.0}),
    ],
)
def test_default_bounds_of_the_corrections(over, weight):
    config = algo.LossConfig(**over)
    for ratio, expected in weight.items():
        value, slope = one_token(config, 0.0, 1.0, sampler_logp=-math.log(ratio))
        assert (value, slope) == pytest.approx((-expected, -expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("correction", algo.CORRECTIONS)
def test_a_weight_at_its_bound_is_kept(correction):
    """A sampler that is the old policy has weight 1 exactly, which both bounds may be."""
    config = algo.LossConfig(correction=correction, correction_low=1.0, correction_high=1.0, veto=1.0)
    assert one_token(config, 0.0, 1.0, sampler_logp=0.0) == (-1.0, -1.0)


@pytest.mark.parametrize(("sampler", "kept"), [(0.5, False), (0.4, True)])
def test_off_policy_threshold(sampler, kept):
    """The mean of log(q / pi) is sampler - logp; only negative advantages are dropped."""
    config = algo.LossConfig(off_policy_threshold=0.45)
    assert one_token(config, 0.0, -1.0, sampler_logp=sampler)[1] == (1.0 if kept else 0.0)
    assert one_token(config, 0.0, 1.0, sampler_logp=sampler)[1] == -1.0


def test_the_drift_that_the_threshold_judges_is_not_clamped():
    config = algo.LossConfig(off_policy_threshold=50.0)
    assert one_token(config, 0.0, -1.0, sampler_logp=60.0)[1] == 0.0
    assert one_token(config, 0.0, -1.0, sampler_logp=40.0)[1] == 1.0


def test_a_sample_without_a_reward_counts_and_carries_the_kl():
    """Its advantage is 0: nothing of the policy term, but its tokens and its sequence stay in every denominator."""
    step = make_step(9, (2, 7), masked="none")
    advantages = algo.group_advantages(jnp.array([[1.0, jnp.nan, 0.0]]), estimator="dr_grpo")[0, :2]
    assert advantages.tolist() == [0.5, 0.0]
    arrays = arrays_of(dataclasses.replace(step, advantages=np.asarray(advantages, float)))
    for aggregation, count in (("token_mean", 14), ("seq_mean_token_sum", 2)):
        config = algo.LossConfig(clip_low=None, clip_high=None, aggregation=aggregation)
        _, slope, _ = evaluate(config, arrays)
        np.testing.assert_allclose(slope[0], -0.5 * np.exp(step.logp[0] - step.old_logp[0]) / count, rtol=1e-5)
        assert (slope[1] == 0).all()
        _, slope, _ = evaluate(dataclasses.replace(config, kl_coef=0.1, kl_estimator="k2"), arrays)
        np.testing.assert_allclose(slope[1], 0.1 * (step.logp[1] - step.ref_logp[1]) / count, rtol=1e-4, atol=1e-8)


def test_vespo_weight_is_one_on_policy_and_has_its_maximum_where_stated():
    config = algo.LossConfig(surrogate="vespo")
    assert one_token(config, 0.0, 1.0)[1] == pytest.approx(-1.0, rel=1e-12)
    assert one_token(config, 0.0, -1.0)[1] == pytest.approx(1.0, rel=1e-12)
    for advantage, ratio, most in ((1.0, 2 / 3, math.e * 4 / 9), (-1.0, 3 / 2, 27 / 8 / math.e)):
        weight = lambda r, a=advantage: -a * one_token(config, math.log(r), a)[1]  # noqa: E731
        assert weight(ratio) == pytest.approx(most, rel=1e-12)
        assert weight(ratio * 1.05) < most and weight(ratio / 1.05) < most


def test_sapo_has_slope_of_reinforce_on_policy():
    config = algo.LossConfig(surrogate="sapo")
    for advantage in (-2.0, 3.0):
        assert one_token(config, 0.0, advantage) == pytest.approx(
            (-2.0 / (1.0 if advantage > 0 else 1.05) * advantage, -advantage), rel=1e-12
        )


def test_dppo_drops_what_moved_too_far_with_its_advantage():
    config = algo.LossConfig(surrogate="dppo")
    with x64():
        old, mask = jnp.full((4, 1), math.log(0.4)), jnp.ones((4, 1), bool)
        logp, adv = jnp.log(jnp.array([[0.7], [0.7], [0.1], [0.1]])), jnp.array([1.0, -1.0, -1.0, 1.0])
        slope = jax.grad(lambda x: algo.policy_loss(x, old, adv, mask, config)[0])(logp)
    np.testing.assert_allclose(slope[:, 0], [0.0, 1.75 / 4, 0.0, -0.25 / 4], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("count", "share"), [(6, 0.2), (11, 0.2), (21, 0.2), (11, 0.3), (5, 0.5), (101, 0.1), (1, 0.2)]
)
def test_an_entropy_at_the_quantile_keeps_its_term(count, share, dtype):
    """The quantile falls on a token exactly: it and those above stay, for shares that are no binary fractions too."""
    config = algo.LossConfig(entropy_top=share)
    entropy, mask = np.full((1, 101), np.nan), np.arange(101)[None] < count
    entropy[mask] = np.random.default_rng(count).permutation(count) * 0.1 + 0.1
    with x64():
        zeros = jnp.zeros((1, 101), dtype)
        main = (zeros, jnp.ones(1, dtype), jnp.asarray(mask), config)
        slope = jax.grad(lambda x: algo.policy_loss(x, *main, entropy=jnp.asarray(entropy, dtype))[0])(zeros)
    kept = (np.asarray(slope) != 0)[mask]
    assert kept.sum() == round(share * (count - 1)) + 1
    assert entropy[mask][kept].min() > entropy[mask][~kept].max(initial=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_equal_entropies_all_stay(dtype):
    config = algo.LossConfig(entropy_top=0.2)
    with x64():
        entropy = jnp.full((3, 7), 0.1, dtype)
        zeros = jnp.zeros((3, 7), dtype)
        main = (zeros, jnp.ones(3, dtype), jnp.ones((3, 7), bool), config)
        slope = jax.grad(lambda x: algo.policy_loss(x, *main, entropy=entropy)[0])(zeros)
        choice = algo.choose(config, main[2], logp=zeros, advantages=main[1], entropy=entropy)
    assert (np.asarray(slope) != 0).all() and choice.kept.all()


def test_clip_cov_takes_out_all_eligible_where_there_are_fewer_than_it_may():
    """Covariances: 4 tokens of advantage and logp of one sign; none within an empty band, all within a wide one."""
    logp = jnp.array([[-1.0, -3.0], [-1.0, -3.0]])
    main = (logp, jnp.array([[1.0, -1.0], [1.0, -1.0]]), jnp.ones((2, 2), bool))

    def slope(**over):
        config = algo.LossConfig(surrogate="clip_cov", **over)
        return jax.grad(lambda x: algo.policy_loss(x, *main, config, key=jax.random.key(0))[0])(logp)

    assert (np.asarray(slope(clip_cov_low=2.0)) != 0).all()
    assert (np.asarray(slope(clip_cov_low=0.5, clip_cov_share=1.0)) == 0).all()
    assert np.count_nonzero(slope(clip_cov_low=0.5)) == 3  # floor(2e-4 * 4) = 0, and at least one
    np.testing.assert_allclose(slope(clip_cov_low=2.0)[0], [-0.25, 0.25])


def test_kl_cov_ties_go_to_the_earlier_row_and_position():
    """All covariances are 1 exactly: the penalty goes to the first tokens in order of row id, then position."""
    logp = jnp.array([[-1.0, -3.0], [-1.0, -3.0]])
    old, mask = logp - 0.5, jnp.ones((2, 2), bool)
    adv = jnp.array([[1.0, -1.0], [1.0, -1.0]])

    def penalised(**more):
        def loss(coef):
            config = algo.LossConfig(surrogate="kl_cov", kl_cov_share=0.5, kl_cov_coef=coef)
            return jax.grad(lambda x: algo.policy_loss(x, old, adv, mask, config, **more)[0])(logp)

        return np.asarray(loss(1.0) - loss(0.0)) != 0

    np.testing.assert_array_equal(penalised(), [[True, True], [False, False]])
    swapped = {"row_ids": jnp.array([7, 2]), "positions": jnp.array([[1, 0], [1, 0]])}
    np.testing.assert_array_equal(penalised(**swapped), [[False, False], [True, True]])
    mixed = {"row_ids": jnp.array([3, 3]), "positions": jnp.array([[3, 0], [1, 2]])}
    np.testing.assert_array_equal(penalised(**mixed), [[False, True], [True, False]])


def test_zero_advantages_train_nothing():
    for name, config in CONFIGS.items():
        if config.kl_in_loss or config.entropy_coef or config.surrogate == "kl_cov":
            continue
        step = make_step(8, (5, 7))
        still = dataclasses.replace(step, advantages=np.zeros(5))
        value, slope, _ = evaluate(config, arrays_of(still))
        assert value == 0 and (slope == 0).all(), name
