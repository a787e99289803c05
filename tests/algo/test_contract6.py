"""Contract 6: losses are per token, and in a packed row a sequence-level quantity reduces over its own segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import algo
from grpo_jax.algo.refusals import RATIO_LEVELS
from grpo_jax.algo.spec import LossConfig

PAIRS = [
    (name, level) for name, levels in RATIO_LEVELS.items() for level in levels if name not in ("clip_cov", "kl_cov")
]
"""All but those that choose tokens by statistics of the whole step, neighbours included: test_contract5.py has them."""
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 3, 3]])
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 1]], bool)


@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
def test_contract_6_a_neighbour_in_the_row_changes_nothing(surrogate, level):
    config = LossConfig(surrogate=surrogate, ratio_level=level, aggregation="seq_mean_token_mean")
    rng = np.random.default_rng(0)
    old = rng.normal(-1, 0.3, MASK.shape).astype(np.float32)
    logp = old + rng.normal(0, 0.1, MASK.shape).astype(np.float32)
    advantages = np.where(SEGMENTS == 1, 1.0, np.where(SEGMENTS == 2, -0.7, 0.4)).astype(np.float32)
    counted = algo.denominators(config, MASK, segments=SEGMENTS, sequences=5)

    def gradient(values):
        def loss(x):
            return algo.policy_loss(
                x, old, advantages, MASK, config, segments=SEGMENTS, denominators=counted, sampler_logp=old
            )[0]

        return np.asarray(jax.grad(loss)(jnp.asarray(values)))

    other = logp + np.where(SEGMENTS == 2, 0.3, 0.0).astype(np.float32)
    before, after = gradient(logp), gradient(other)
    same = (SEGMENTS != 2) & MASK
    np.testing.assert_allclose(after[same], before[same], rtol=1e-5, atol=1e-7)
    assert (before[~MASK] == 0).all() and np.abs(before[MASK]).max() > 0
