"""Drawing tokens: the distribution, its edges, and what addresses each uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from grpo_jax.rollout.sampling import Sampling, invert_cdf, row_keys, sample, split_ids, uniforms
from grpo_jax.rollout.truncation import truncate

LAST = 1.0 - 2.0**-24


def exact(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The truncated distribution in float64, token by token."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if sampling.top_k is not None:
        p[p < np.sort(p)[-sampling.top_k]] = 0.0
    if sampling.top_p is not None:
        kept, order, mass = set(), np.argsort(-p), 0.0
        for token in order:
            if mass >= sampling.top_p * p.sum():
                break
            kept.add(int(token))
            mass += p[token]
        p = np.array([x if i in kept else 0.0 for i, x in enumerate(p)])
    return p / p.sum()


@pytest.mark.parametrize("vocab", [7, 256, 300])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}]
)
def test_draws_follow_the_truncated_distribution(vocab, options):
    sampling = Sampling(**options)
    logits = 2.0 * np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    count = 40_000
    draw = jax.jit(lambda u: sample(jnp.tile(logits, (10_000, 1)), u, sampling, sampling.temperature)[0])
    uniform = np.random.default_rng(1).random((4, 10_000), np.float32)
    tokens = np.concatenate([np.asarray(draw(u)) for u in uniform])
    expected = exact(logits, sampling) * count
    seen = np.bincount(tokens, minlength=vocab)
    assert seen[expected == 0].sum() == 0
    common = expected > 5
    rest_seen, rest_expected = seen[~common].sum(), expected[~common].sum()
    observed, wanted = list(seen[common]), list(expected[common])
    if rest_expected > 5:
        observed, wanted = [*observed, rest_seen], [*wanted, rest_expected]
    wanted = np.array(wanted) * sum(observed) / sum(wanted)
    assert len(observed) == 1 or stats.chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [1, 3, 256, 257, 700])
@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, LAST])
def test_a_token_of_probability_zero_is_never_drawn(vocab, u):
    rng = np.random.default_rng(vocab)
    weights = rng.random((64, vocab), np.float32) ** 8
    weights[rng.random(weights.shape) < 0.7] = 0.0
    weights[np.arange(64), rng.integers(0, vocab, 64)] = 1e-3
    token = np.asarray(invert_cdf(jnp.asarray(weights), jnp.full(64, u, jnp.float32)))
    assert (weights[np.arange(64), token] > 0).all()


@pytest.mark.parametrize("vocab", [5, 300, 1024])
def test_the_draw_inverts_the_cumulative_distribution(vocab):
    weights = np.random.default_rng(0).random((200, vocab)).astype(np.float32)
    u = np.random.default_rng(1).random(200).astype(np.float32)
    token = np.asarray(invert_cdf(jnp.asarray(weights), jnp.asarray(u)))
    cdf = np.cumsum(weights.astype(np.float64), -1) / weights.sum(-1, dtype=np.float64, keepdims=True)
    upper = cdf[np.arange(200), token]
    lower = np.where(token > 0, cdf[np.arange(200), token - 1], 0.0)
    assert (lower - 1e-6 <= u).all() and (u <= upper + 1e-6).all()


def test_sampler_logp_is_that_of_the_tempered_distribution_before_truncation():
    logits = np.random.default_rng(0).standard_normal((16, 50)).astype(np.float32)
    u = np.linspace(0, LAST, 16, dtype=np.float32)
    token, logp, _ = sample(jnp.asarray(logits), jnp.asarray(u), Sampling(top_k=3), 0.5)
    expected = jax.nn.log_softmax(jnp.asarray(logits) / 0.5)[jnp.arange(16), token]
    np.testing.assert_allclose(logp, expected, atol=1e-6)


def test_temperature_zero_is_greedy_and_scores_at_temperature_one():
    logits = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    token, logp, _ = sample(jnp.asarray(logits), jnp.zeros(8), Sampling(top_p=0.5), 0.0)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


def test_truncation_keeps_ties_and_everything_when_off():
    weights = jnp.asarray([[4.0, 2.0, 2.0, 1.0]])
    np.testing.assert_array_equal(truncate(weights, 2, None, None), [[4.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, None, 0.5, None), [[4.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, None, 0.4, None), [[4.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, 9, 1.0, None), weights)


def test_uniforms_are_addressed_and_stay_below_one():
    def draw(seed, step, ids, samples, index):
        keys = row_keys(seed, jnp.uint32(step), jnp.asarray(split_ids(ids)), samples)
        return np.asarray(uniforms(keys, jnp.full(keys.shape, index, jnp.int32)))

    base = draw(3, 5, [10, 2**40, 7], 4, 2)
    assert base.shape == (12,) and ((0 <= base) & (base < 1)).all() and len(set(base.tolist())) == 12
    shuffled = draw(3, 5, [7, 10, 2**40], 4, 2)
    np.testing.assert_array_equal(shuffled.reshape(3, 4)[[1, 2, 0]], base.reshape(3, 4))
    np.testing.assert_array_equal(draw(3, 5, [10, 2**40, 7], 2, 2).reshape(3, 2), base.reshape(3, 4)[:, :2])
    for other in [(4, 5, 2), (3, 6, 2), (3, 5, 3)]:
        assert (draw(other[0], other[1], [10, 2**40, 7], 4, other[2]) != base).all()
    assert (draw(3, 5, [10 + 2**32, 0, 1], 4, 2)[:4] != base[:4]).all()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_refuses_what_cannot_be_sampled(options, field):
    with pytest.raises(ValueError, match=field):
        Sampling(**options)
    with pytest.raises(ValueError, match="request_ids"):
        split_ids([-1])
