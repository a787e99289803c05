"""No last bit decides what is trained: the same step, as two programs round it, has the same gradient.

Values that are equal in exact arithmetic (a policy and the one it still is, tokens of a prefix that samples share)
come out a few units of the last place apart. Noise of that size is added here, and the gradient may move by that much.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo

ROWS, COLUMNS, BLOCK = 6, 16, 8
NOISE = 5e-7

ON_POLICY = {
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_share": 0.5},
    "abs": {"kl_coef": 1.0, "kl_estimator": "abs"},
    "ppo_clip, bounds 0": {"clip_low": 0.0, "clip_high": 0.0},
    "gspo, bounds 0": {"clip_low": 0.0, "clip_high": 0.0, "ratio_level": "sequence"},
    "gmpo, bounds 0": {"surrogate": "gmpo", "clip_low": 0.0, "clip_high": 0.0},
    "dppo, bounds 0": {"surrogate": "dppo", "clip_low": 0.0, "clip_high": 0.0},
    "clip_cov, bounds 0": {"surrogate": "clip_cov", "clip_low": 0.0, "clip_high": 0.0, "clip_cov_share": 0.9},
    "icepop, bounds 1": {"correction": "icepop", "correction_low": 1.0, "correction_high": 1.0},
    "seq_mask, bounds 1": {"correction": "seq_mask", "correction_low": 1.0, "correction_high": 1.0},
    "geo_gate, bounds 1": {"correction": "geo_gate", "correction_low": 1.0, "correction_high": 1.0},
    "veto 1": {"veto": 1.0},
    "off_policy_threshold 0": {"off_policy_threshold": 0.0},
}
"""Where pi is pi_old, the sampler and the reference, and a bound lies there."""
BLOCKS = {
    "entropy_top": {"entropy_top": 0.4},
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_share": 0.4, "kl_cov_coef": 5.0},
    "clip_cov": {"surrogate": "clip_cov", "clip_cov_low": 1.0, "clip_cov_high": 5.0, "clip_cov_share": 1.0},
}
"""Where blocks of tokens are equal in what is ranked or compared with a bound."""


def gradient(config, arrays, noise):
    """Of the loss of a step whose numbers a program of its own rounds (``noise``: a seed; None: as they are)."""
    if noise is not None:
        rng = np.random.default_rng(noise)
        arrays = {
            name: x + (NOISE * rng.uniform(-1, 1, x.shape) if name != "advantages" else 0) for name, x in arrays.items()
        }
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    logp, old, advantages = (given.pop(name) for name in ("logp", "old_logp", "advantages"))
    main = (old, advantages, jnp.ones((ROWS, COLUMNS), bool), config)
    return np.asarray(jax.grad(lambda x: algo.policy_loss(x, *main, key=jax.random.key(1), **given)[0])(logp))


def assert_steady(config, arrays):
    expected = gradient(config, arrays, None)
    assert np.abs(expected).max() > 0
    for seed in (1, 2):
        np.testing.assert_allclose(gradient(config, arrays, seed), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy(name):
    rng = np.random.default_rng(3)
    logp = -rng.exponential(1.0, (ROWS, COLUMNS))
    arrays = dict.fromkeys(("logp", "old_logp", "ref_logp", "sampler_logp"), logp)
    advantages = np.repeat(np.sign(rng.normal(size=(ROWS, 1))), COLUMNS, 1)
    assert_steady(algo.LossConfig(**ON_POLICY[name]), arrays | {"advantages": advantages})


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_equal_tokens(name):
    """Blocks of eight, through the middle of which a share cuts; the old policy is far off, so |d| has its slope."""
    rng = np.random.default_rng(4)
    logp = np.repeat(-rng.exponential(1.0, (ROWS, COLUMNS // BLOCK)), BLOCK, 1)
    advantages = np.repeat(rng.normal(size=(ROWS, 1)), COLUMNS, 1)
    if name == "clip_cov":  # half of the tokens have the covariance 1, which is the bound
        logp = np.where(np.arange(COLUMNS) < BLOCK, -1.0, -3.0) * np.ones((ROWS, 1))
        advantages = np.where(np.arange(COLUMNS) < BLOCK, 1.0, -1.0) * np.ones((ROWS, 1))
    arrays = {"logp": logp, "old_logp": logp - 0.1, "advantages": advantages}
    arrays["entropy"] = np.repeat(rng.exponential(1.0, (ROWS, COLUMNS // BLOCK)), BLOCK, 1)
    assert_steady(algo.LossConfig(**BLOCKS[name]), arrays)


def test_an_absolute_value_has_its_slope_away_from_zero():
    from grpo_jax.algo.arrays import magnitude

    x = jnp.array([0.0, 1e-4, -1e-4, 5.5e-4, -5.5e-4, 1e-3, -2.0])
    np.testing.assert_array_equal(magnitude(x), jnp.abs(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(magnitude))(x), [0, 0, 0, 0.5, -0.5, 1, -1], atol=1e-6)
