"""Drawing tokens: the distribution, its edges, and what addresses each uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from scipy import stats
from scipy.special import log_softmax

from grpo_jax.rollout.sampling import History, Sampling, invert_cdf, row_keys, sample, split_ids, uniforms
from grpo_jax.rollout.truncation import penalize, truncate

LAST = 1.0 - 2.0**-24
INVERT, SAMPLE, UNIFORMS = jax.jit(invert_cdf), jax.jit(sample, static_argnums=2), jax.jit(uniforms)
KEYS = jax.jit(row_keys, static_argnums=3)


def exact(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The truncated distribution in float64, token by token."""
    logits = logits.astype(np.float64)
    for token in {*HISTORY["prompt"], *HISTORY["own"]}:
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(HISTORY["own"]):
        logits[token] -= sampling.presence_penalty
    never = [*sampling.banned_ids, *(sampling.stop_ids if sampling.min_tokens > len(HISTORY["own"]) else ())]
    logits[never] = -np.inf
    scaled = logits / sampling.temperature
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
    if sampling.min_p is not None:
        p[p < sampling.min_p * p.max()] = 0.0
    return p / p.sum()


OPTIONS: dict[str, dict] = {
    "all": {},
    "cooler": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "both": {"top_k": 6, "top_p": 0.95},
    "min-p": {"min_p": 0.1, "temperature": 1.4},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.7, "top_p": 0.9},
    "bans": {"banned_ids": (0, 3, 5), "stop_ids": (1, 2), "min_tokens": 4},
}
HISTORY = {"prompt": [4, 9, 4], "own": [6, 9]}
"""What was sampled before: in the prompt, in the completion."""


DRAWN = [*((61, name) for name in OPTIONS), (300, "all"), (300, "top-p")]


@pytest.mark.parametrize(("vocab", "name"), slow_but({*DRAWN} - {(61, "both"), (300, "top-p")}, DRAWN))
def test_a_million_draws_follow_the_exact_distribution(vocab, name):
    """By the engine's own uniforms: of 20,000 rows at 50 places each."""
    sampling = Sampling(**OPTIONS[name])
    logits = 2.0 * np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    size, parts = 20_000, 50
    one = {
        "length": jnp.full(size, 2, jnp.int32),
        "tokens": jnp.tile(jnp.asarray([*HISTORY["own"], 7]), (size, 1)),  # what follows the length is ignored
        "prompt": jnp.tile(jnp.asarray([*HISTORY["prompt"], 8]), (size, 1)),
        "prompt_len": jnp.full(size, 3, jnp.int32),
    }

    keys = KEYS(3, np.uint32(5), split_ids(list(range(size // 8))), 8)

    def count(place):
        u = uniforms(keys, jnp.full(size, place))
        tiled = jnp.tile(logits, (size, 1))
        token, _, drawn = sample(tiled, u, sampling.rules, sampling.temperature, History(**one))
        drawn = jnp.zeros(size) if drawn is None else drawn
        return jnp.bincount(token, length=vocab), jnp.zeros(vocab).at[token].set(drawn)

    # Optimised, as in a run and not as in other tests: a million draws take more than the compiling.
    fast = jax.jit(count).lower(jnp.int32(0)).compile(compiler_options={"xla_backend_optimization_level": 2})
    seen, logp = np.zeros(vocab, int), np.zeros(vocab)
    for place in range(parts):
        counted, drawn = fast(jnp.int32(place))
        seen, logp = seen + np.asarray(counted), np.where(np.asarray(counted) > 0, drawn, logp)
    p = exact(logits, sampling)
    expected = p * size * parts
    assert seen.sum() == size * parts and seen[p == 0].sum() == 0
    if sampling.changed:
        np.testing.assert_allclose(logp[seen > 0], np.log(p[seen > 0]), atol=2e-5)
    common = expected > 5
    observed, wanted = [*seen[common], seen[~common].sum()], [*expected[common], expected[~common].sum()]
    keep = np.array(wanted) > 5
    observed, wanted = np.array(observed)[keep], np.array(wanted)[keep]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [1, 3, 256, 257, 640, 700])
def test_a_token_of_probability_zero_is_never_drawn(vocab):
    """Whatever the uniform: 0, the last below 1, and between."""
    rng = np.random.default_rng(vocab)
    weights = rng.random((64, vocab), np.float32) ** 8
    weights[rng.random(weights.shape) < 0.7] = 0.0
    weights[np.arange(64), rng.integers(0, vocab, 64)] = 1e-3
    u = np.repeat(np.float32([0.0, 0.25, 0.5, LAST]), 64)
    token, total = INVERT(np.tile(weights, (4, 1)), u)
    np.testing.assert_allclose(total, np.tile(weights.sum(-1), 4), rtol=1e-5)
    assert (np.tile(weights, (4, 1))[np.arange(256), np.asarray(token)] > 0).all()


@pytest.mark.parametrize("vocab", [5, 300, 896, 1024])
def test_the_draw_inverts_the_cumulative_distribution(vocab):
    weights = np.random.default_rng(0).random((200, vocab)).astype(np.float32)
    u = np.random.default_rng(1).random(200).astype(np.float32)
    token = np.asarray(INVERT(weights, u)[0])
    cdf = np.cumsum(weights.astype(np.float64), -1) / weights.sum(-1, dtype=np.float64, keepdims=True)
    upper = cdf[np.arange(200), token]
    lower = np.where(token > 0, cdf[np.arange(200), token - 1], 0.0)
    assert (lower - 1e-6 <= u).all() and (u <= upper + 1e-6).all()


def test_sampler_logp_is_that_of_the_tempered_distribution_before_truncation():
    logits = np.random.default_rng(0).standard_normal((16, 50)).astype(np.float32)
    u = np.linspace(0, LAST, 16, dtype=np.float32)
    token, logp, _ = SAMPLE(logits, u, Sampling(top_k=3), 0.5)
    expected = log_softmax(logits / 0.5, axis=-1)[np.arange(16), np.asarray(token)]
    np.testing.assert_allclose(logp, expected, atol=1e-6)


def test_temperature_zero_is_greedy_and_scores_at_temperature_one():
    logits = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    token, logp, _ = SAMPLE(logits, np.zeros(8, np.float32), Sampling(top_p=0.5), 0.0)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_allclose(logp, log_softmax(logits, axis=-1).max(-1), atol=1e-6)


def test_truncation_keeps_ties_and_everything_when_off():
    weights = jnp.asarray([[4.0, 2.0, 2.0, 1.0]])
    np.testing.assert_array_equal(truncate(weights, 2, None, None), [[4.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, None, 0.5, None), [[4.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, None, 0.4, None), [[4.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(truncate(weights, 9, 1.0, None), weights)


def test_uniforms_are_uniform_along_rows_samples_and_places():
    """Each part of the address by itself, and each value beside the one before it."""
    keys = KEYS(7, np.uint32(1), split_ids([3 * i for i in range(64)]), 64)
    drawn = np.stack([UNIFORMS(keys, np.full(4096, place, np.int32)) for place in range(8)]).reshape(8, 64, 64)
    for axis in range(3):
        lines = np.moveaxis(drawn, axis, -1).astype(np.float64)
        assert stats.kstest(lines.reshape(-1), "uniform").pvalue > 1e-4
        pairs = np.histogram2d(lines[..., :-1].reshape(-1), lines[..., 1:].reshape(-1), 8, [[0, 1], [0, 1]])[0]
        assert stats.chisquare(pairs.reshape(-1)).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [1e-2, 1e-5, 1e-30])
@pytest.mark.parametrize("rules", [Sampling(), Sampling(banned_ids=(3,))])
def test_a_small_temperature_is_all_but_greedy(temperature, rules):
    logits = 10 * np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    token, logp, _ = SAMPLE(logits, np.full(64, 0.5, np.float32), rules, temperature)
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max(-1, keepdims=True)).astype(np.float64) / temperature
    expected = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    best = np.where(np.arange(32) == 3, -np.inf, logits).argmax(-1) if rules.banned_ids else logits.argmax(-1)
    clear = np.sort(logits, -1)[:, -1] - np.sort(logits, -1)[:, -2] > 60 * temperature
    np.testing.assert_array_equal(np.asarray(token)[clear], best[clear])
    chosen = expected[np.arange(64), np.asarray(token)]
    likely = chosen > -80
    np.testing.assert_allclose(np.asarray(logp)[likely], chosen[likely], atol=2e-5)


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary():
    token, logp, _ = SAMPLE(np.full((2, 300), np.nan, np.float32), np.full(2, 0.5, np.float32), Sampling(), 1.0)
    assert (np.asarray(token) < 300).all() and np.isnan(logp).all()


def test_uniforms_are_addressed_and_stay_below_one():
    def draw(seed, step, ids, samples, index):
        keys = KEYS(seed, np.uint32(step), split_ids(ids), samples)
        return np.asarray(UNIFORMS(keys, np.full(keys.shape, index, np.int32)))

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
        ({"min_p": 0.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"min_tokens": 65}, "min_tokens"),
        ({"stop_strings": ("",)}, "stop_strings"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_refuses_what_cannot_be_sampled(options, field):
    with pytest.raises(ValueError, match=field):
        Sampling(**options)
    with pytest.raises(ValueError, match="request_ids"):
        split_ids([-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"banned_ids": (7,)}, "banned_ids: got .7,., and the model knows 0 to 6"),
        ({"stop_ids": (-1,)}, "stop_ids"),
        ({"banned_ids": (0, 1, 2, 3, 4), "stop_ids": (5, 6), "min_tokens": 1}, "leave one to draw"),
    ],
)
def test_refuses_what_leaves_nothing_to_draw(options, message):
    Sampling().check(7)
    with pytest.raises(ValueError, match=message):
        Sampling(**options).check(7)


def test_what_follows_the_end_is_not_seen_and_the_least_number_of_tokens_is_enough():
    tokens, nothing = jnp.array([[2, 3], [4, 3]]), jnp.zeros((2, 1), jnp.int32)
    history = History(jnp.array([1, 2]), tokens, nothing, jnp.zeros(2, jnp.int32))
    rules = Sampling(presence_penalty=1.0, repetition_penalty=2.0, min_tokens=2, stop_ids=(1,))
    got = jax.jit(penalize, static_argnums=1)(np.full((2, 5), 4.0, np.float32), rules, history)
    np.testing.assert_array_equal(got, [[4, -np.inf, 1, 4, 4], [4, 4, 4, 1, 1]])


def test_penalties_without_a_history_are_refused():
    with pytest.raises(ValueError, match="history"):
        sample(jnp.zeros((1, 7)), jnp.zeros(1), Sampling(presence_penalty=1.0), 1.0)
