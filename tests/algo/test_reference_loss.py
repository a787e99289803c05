"""policy_loss against its slow reference: values and gradients, in float64 to 1e-9 and lower precisions to theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import algo
from grpo_jax.algo.refusals import RATIO_LEVELS

from . import reference_loss as slow_loss
from .cases import BFLOAT16, FLOAT32, FLOAT64, SHAPES, assert_close, few, make_step, steps, x64

COMBINATIONS = [(surrogate, level) for surrogate, levels in RATIO_LEVELS.items() for level in levels]
SHARES = (0.0371, 0.2719, 0.6173)
"""Shares whose quantile never falls on a token, where rounding would decide; test_edges.py has those that do."""


@st.composite
def configs(draw):
    """A random LossConfig that MATH.md allows, over every name of every table."""
    surrogate = draw(st.sampled_from(sorted(algo.SURROGATES)))
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    out = {
        "surrogate": surrogate,
        "ratio_level": pick(*slow_loss.LEVELS.get(surrogate, ("token",))),
        "clip_low": pick(0.2, 0.0, 0.05, None),
        "clip_high": pick(0.28, 0.0, 0.05, 4.0, None),
        "aggregation": pick(*sorted(algo.AGGREGATIONS)),
        "max_completion_len": 13,
        "entropy_coef": pick(0.0, 0.01),
        "off_policy_threshold": pick(None, 0.0123, -0.0321),
        "kl_coef": pick(0.0, 0.1),
        "kl_estimator": pick(*sorted(algo.KL_ESTIMATORS)),
    }
    if surrogate == "ppo_clip":
        if out["clip_high"] is not None:
            out["delta"] = pick(None, 1.0 + out["clip_high"], 5.5)
        if out.get("delta") is None:
            out["dual_clip"] = pick(None, 1.1, 3.0)
    if surrogate != "gmpo":
        out["entropy_top"] = pick(1.0, *SHARES)
    tables = ("tis", "icepop") if surrogate == "vespo" else sorted(algo.CORRECTIONS)
    out["correction"] = pick(None, *tables)
    if out["correction"] is not None:
        given_bounds = draw(st.booleans()) or out["correction"] in ("geo_tis", "geo_mask")
        out["correction_low"], out["correction_high"] = pick((0.9, 1.1), (0.5, 1.3)) if given_bounds else (None, None)
    out["veto"] = pick(None, None, 0.8, 1e-4)
    out.update(sapo_tau_pos=pick(1.0, 2.0), vespo_k_neg=pick(3.0, 1.0), vespo_lambda_pos=pick(3.0, 0.5))
    out.update(kl_cov_share=pick(2e-4, 0.3), kl_cov_coef=pick(1.0, 0.1))
    out["clip_cov_low"], out["clip_cov_high"] = pick((1.0, 5.0), (-0.2, 0.3), (-5.0, 5.0))
    out["clip_cov_share"] = pick(2e-4, 0.3)
    return algo.LossConfig(**out)


KEY_SEED = 3


def fast_loss(step, config, dtype=jnp.float64, denominators=None):
    """policy_loss and its gradients in logp and entropy, eager: (loss, gradient, gradient) as float64 NumPy."""

    def cast(x):
        return jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)

    with x64():
        s = step.map(cast)

        def loss(logp, entropy):
            return algo.policy_loss(
                logp,
                s.old_logp,
                s.advantages,
                s.mask,
                config=config,
                ref_logp=s.ref_logp,
                sampler_logp=s.sampler_logp,
                entropy=entropy,
                segments=s.segments,
                denominators=denominators,
                key=jax.random.key(KEY_SEED),
            )[0]

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(s.logp, s.entropy)
        assert value.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        return float(value), *(np.asarray(g, np.float64) for g in grads)


def slow_step(step, config, draws=None):
    return slow_loss.policy_loss(
        step.logp,
        step.old_logp,
        step.advantages,
        step.mask,
        config,
        step.ref_logp,
        step.sampler_logp,
        step.entropy,
        step.segments,
        draws,
    )


def uniform_draws(shape):
    """clip_cov's uniforms: the key folded with the row, then with the position."""
    key = jax.random.key(KEY_SEED)
    rows, columns = np.indices(shape)
    fold = lambda n, t: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, n), t), dtype=jnp.float32)  # noqa: E731
    return np.asarray(jax.vmap(jax.vmap(fold))(jnp.asarray(rows), jnp.asarray(columns)))


DRAWS = {shape: uniform_draws(shape) for shape in SHAPES}


def compare(step, config, dtype=jnp.float64, tolerance=FLOAT64, gradient_tolerance=None):
    """The loss and both gradients of one step, fast against slow."""
    got = fast_loss(step, config, dtype)
    expected = slow_step(step.cast(dtype), config, DRAWS.get(step.mask.shape))
    assert_close(got[0], expected[0], tolerance)
    for g, e in zip(got[1:], expected[1:], strict=True):
        assert_close(g, e, gradient_tolerance or tolerance)
        assert (g[~step.mask] == 0).all()


def test_every_name_of_the_loss_has_a_reference():
    assert set(algo.SURROGATES) == set(slow_loss.SURROGATES)
    assert set(algo.KL_ESTIMATORS) == set(slow_loss.KL)
    every = {"tis", "icepop", "seq_tis", "seq_mask", "geo_tis", "geo_mask", "geo_gate"}
    assert set(algo.CORRECTIONS) == every
    assert set(algo.AGGREGATIONS) == {"token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"}


BOUNDS = dict(correction_low=0.5, correction_high=1.5)
ROWS = {
    **{f"{name} {level}": dict(surrogate=name, ratio_level=level) for name, level in COMBINATIONS},
    **{name: dict(correction=name, **BOUNDS) for name in algo.CORRECTIONS},
    **{f"vespo {name}": dict(surrogate="vespo", correction=name, **BOUNDS) for name in ("tis", "icepop")},
    **{name: dict(kl_estimator=name, kl_coef=0.1) for name in algo.KL_ESTIMATORS},
    **{name: dict(aggregation=name, entropy_coef=0.01) for name in algo.AGGREGATIONS},
    "veto": dict(veto=0.8),
    "off_policy_threshold": dict(off_policy_threshold=0.0123),
    "entropy_top": dict(entropy_top=SHARES[1]),
    "delta": dict(delta=1.25),
    "dual_clip": dict(dual_clip=1.1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_tables(name, packed):
    """Each alone, on a step with several tokens to a sequence."""
    over = dict(max_completion_len=13, clip_cov_low=-0.2, clip_cov_high=0.3, clip_cov_share=0.3, kl_cov_share=0.3)
    compare(make_step(4, (5, 7), packed=packed), algo.LossConfig(**over | ROWS[name]))


@few(40)
@given(config=configs(), options=steps())
def test_policy_loss(config, options):
    compare(make_step(**options), config)


@pytest.mark.slow
@few(160)
@given(config=configs(), options=steps())
def test_policy_loss_on_more_configs(config, options):
    compare(make_step(**options), config)


@pytest.mark.parametrize("name", sorted(algo.PRESETS))
@few(3)
@given(options=steps(shape=(5, 7)))
def test_presets(name, options):
    compare(make_step(**options), algo.LossConfig.preset(name))


low_precision = given(
    config=configs(), seed=st.integers(0, 2**31), packed=st.booleans(), drift=st.sampled_from([0.0, 0.01, 0.3])
)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@dtypes
@few(15)
@low_precision
def test_policy_loss_in_low_precision(dtype, config, seed, packed, drift):
    compare_in(dtype, config, seed, packed, drift)


@pytest.mark.slow
@dtypes
@few(60)
@low_precision
def test_policy_loss_in_low_precision_on_more_configs(dtype, config, seed, packed, drift):
    compare_in(dtype, config, seed, packed, drift)


def compare_in(dtype, config, seed, packed, drift):
    """Arithmetic in float32; only the gradient handed back for bfloat16 inputs is rounded to bfloat16."""
    step = make_step(seed, (5, 7), packed=packed, drift=drift)
    compare(step, config, dtype, FLOAT32, FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@pytest.mark.parametrize("surrogate", sorted(set(algo.SURROGATES) - {"gmpo", "vespo"}))
@few(4)
@given(seed=st.integers(0, 2**31), packed=st.booleans())
def test_advantages_that_differ_within_a_sequence(surrogate, seed, packed):
    config = algo.LossConfig(surrogate=surrogate, clip_cov_low=-1.0)
    compare(make_step(seed, (5, 7), packed=packed, token_advantages=True), config)


@pytest.mark.parametrize("preset", sorted(algo.PRESETS))
def test_old_logp_none_is_logp_without_gradient(preset):
    config, step = algo.LossConfig.preset(preset), make_step(1, (5, 7))
    with x64():
        logp, adv, mask, ref = map(jnp.asarray, (step.logp, step.advantages, step.mask, step.ref_logp))
        loss = lambda x: algo.policy_loss(x, None, adv, mask, config, ref_logp=ref)[0]  # noqa: E731
        value, grad = jax.value_and_grad(loss)(logp)
    expected = slow_loss.policy_loss(step.logp, None, step.advantages, step.mask, config, step.ref_logp)
    assert_close(value, expected[0], FLOAT64)
    assert_close(grad, expected[1], FLOAT64)


@pytest.mark.parametrize("aggregation", sorted(algo.AGGREGATIONS))
def test_sequences_that_were_sampled_and_filtered_out_count(aggregation):
    config = algo.LossConfig(aggregation=aggregation, max_completion_len=13, entropy_coef=0.1)
    step = make_step(2, (5, 7))
    with x64():
        counts = algo.denominators(config, jnp.asarray(step.mask), sequences=9)
        assert int(counts.tokens) == step.mask.sum() and int(counts.sequences) == 9
    got = fast_loss(step, config, denominators=counts)
    expected = slow_loss.policy_loss(
        step.logp, step.old_logp, step.advantages, step.mask, config, entropy=step.entropy, count=9
    )
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, FLOAT64)
