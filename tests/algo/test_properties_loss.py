"""What holds for every surrogate, level, aggregation and correction, so that a new row is tested by being a row.

Shapes are primes, masks ragged, and masked positions hold NaN throughout.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but

from grpo_jax import algo
from grpo_jax.algo.refusals import RATIO_LEVELS

N, T = 5, 7
LIMIT = 11
"""max_completion_len."""

COMBINATIONS = [(surrogate, level) for surrogate, levels in RATIO_LEVELS.items() for level in levels]
combinations = pytest.mark.parametrize(("surrogate", "level"), COMBINATIONS)
SPANNING = [("ppo_clip", "sequence"), ("cispo", "token"), ("gmpo", "token"), ("vespo", "token"), ("kl_cov", "token")]
spanning = pytest.mark.parametrize(("surrogate", "level"), slow_but(SPANNING, COMBINATIONS))
FULL = dict(
    kl_coef=0.1,
    entropy_coef=0.01,
    max_completion_len=LIMIT,
    clip_cov_low=0.05,
    clip_cov_share=0.2,
    kl_cov_share=0.2,
    veto=0.4,
    off_policy_threshold=0.3,
)
"""Everything that any surrogate may be combined with, at once."""


@dataclasses.dataclass
class Rows:
    """The arrays of a step; what the mask leaves out is NaN."""

    arrays: dict
    mask: np.ndarray
    row_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray | None = None

    def map(self, function):
        segments = None if self.segments is None else function(self.segments)
        arrays = {name: function(x) for name, x in self.arrays.items()}
        return Rows(arrays, function(self.mask), function(self.row_ids), function(self.positions), segments)

    def only(self, rows):
        """The same shapes, with what is not in `rows` masked."""
        mask = self.mask & rows[:, None]
        return dataclasses.replace(
            self, mask=mask, arrays={k: np.where(mask, v, np.nan) for k, v in self.arrays.items()}
        )


def make_rows(drift=0.3, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(T) >= rng.integers(0, 2, N)[:, None]
    mask &= np.arange(T) < rng.integers(3, T + 1, N)[:, None]
    mask[3] = False
    logp = -rng.exponential(1.0, (N, T))
    arrays = {
        "logp": logp,
        "old_logp": logp + drift * rng.normal(size=(N, T)),
        "ref_logp": logp + drift * rng.normal(size=(N, T)),
        "sampler_logp": logp + drift * rng.normal(size=(N, T)),
        "entropy": rng.exponential(1.0, (N, T)),
        "advantages": np.broadcast_to(np.array([1.3, -0.7, 0.4, 1.0, -1.1])[:, None], (N, T)),
    }
    arrays = {name: np.where(mask, x, np.nan) for name, x in arrays.items()}
    columns = np.broadcast_to(np.arange(T), (N, T))
    return Rows(arrays, mask, np.broadcast_to(np.arange(N)[:, None], (N, T)), columns)


def gradients(config, arrays, mask, row_ids, positions, segments, denominators):
    """((loss, metrics), gradient of logp, gradient of entropy)."""

    def loss(logp, entropy):
        rest = {k: v for k, v in arrays.items() if k not in ("logp", "old_logp", "advantages", "entropy")}
        more = dict(row_ids=row_ids, positions=positions, segments=segments, key=jax.random.key(7))
        head = (logp, arrays["old_logp"], arrays["advantages"], mask)
        return algo.policy_loss(*head, config, entropy=entropy, denominators=denominators, **rest, **more)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays["logp"], arrays["entropy"])


def count_step(config, arrays, mask, row_ids, positions, segments, sequences):
    more = {k: arrays[k] for k in ("logp", "old_logp", "advantages", "entropy")}
    more |= dict(row_ids=row_ids, positions=positions, key=jax.random.key(7))
    return algo.denominators(config, mask, segments, sequences, **more)


def run(config, rows, denominators=None):
    """(loss, gradient [2, N, T], metrics) in NumPy."""
    (loss, metrics), grads = gradients(
        config, rows.arrays, rows.mask, rows.row_ids, rows.positions, rows.segments, denominators
    )
    return (
        float(loss),
        np.stack([np.asarray(g) for g in grads]),
        {k: (float(a), float(b)) for k, (a, b) in metrics.items()},
    )


def counted(config, rows, sequences=N):
    return count_step(config, rows.arrays, rows.mask, rows.row_ids, rows.positions, rows.segments, sequences)


def configure(surrogate, level, **fields):
    chosen = FULL | dict(correction="tis", aggregation="seq_mean_token_mean") | fields
    if surrogate != "gmpo":
        chosen |= dict(entropy_top=0.6)
    if surrogate != "reinforce":
        chosen |= dict(kl_estimator="k3_unbiased")
    return algo.LossConfig(surrogate=surrogate, ratio_level=level, **chosen)


def assert_same(got, expected):
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=2e-6)


@combinations
def test_masked_tokens_have_exactly_no_gradient_and_nan_does_not_leak(surrogate, level):
    rows = make_rows()
    loss, grads, metrics = run(configure(surrogate, level), rows)
    assert math.isfinite(loss) and np.isfinite(grads).all()
    assert (grads[:, ~rows.mask] == 0).all() and (grads[:, rows.mask] != 0).any()
    assert all(math.isfinite(a) and math.isfinite(b) for a, b in metrics.values())
    zeros = dataclasses.replace(rows, arrays={k: np.nan_to_num(v) for k, v in rows.arrays.items()})
    again = run(configure(surrogate, level), zeros)
    assert again[0] == loss and (again[1] == grads).all() and again[2] == metrics


@combinations
def test_row_order_changes_nothing(surrogate, level):
    config, rows = configure(surrogate, level), make_rows()
    order = np.array([4, 2, 0, 3, 1])
    loss, grads, metrics = run(config, rows)
    mixed = run(config, rows.map(lambda x: x[order]))
    assert_same(mixed, (loss, grads[:, order]))
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose(mixed[2][name], (total, count), rtol=0, atol=1e-5, err_msg=name)


@spanning
def test_padding_changes_nothing(surrogate, level):
    config, rows = configure(surrogate, level), make_rows()
    wide = rows.map(lambda x: np.pad(x, ((0, 1), (0, 4))))
    loss, grads, _ = run(config, rows, counted(config, rows))
    got = run(config, wide, counted(config, wide, N))
    assert_same((got[0], got[1][:, :N, :T]), (loss, grads))
    assert (got[1][:, N:] == 0).all() and (got[1][:, :, T:] == 0).all()


@combinations
def test_microbatches_add_up_to_the_step(surrogate, level):
    config, rows = configure(surrogate, level), make_rows()
    expected = run(config, rows)
    step = counted(config, rows)
    parts = [run(config, rows.only(np.isin(np.arange(N), part)), step) for part in ([0, 4], [3], [1], [2])]
    assert_same((sum(p[0] for p in parts), sum(p[1] for p in parts)), expected)
    for name, (total, count) in expected[2].items():
        sums = tuple(sum(p[2][name][i] for p in parts) for i in (0, 1))
        np.testing.assert_allclose(sums, (total, count), rtol=0, atol=1e-5, err_msg=name)


def pack(rows):
    """Rows 0 and 2 into one, 4 and 1 behind one another into the next, 3 alone; ids neither dense nor sorted."""
    layout = [(0, 9), (2, 2)], [(4, 500), (1, 1)], [(3, 4)]

    def place(x):
        fill = np.zeros((), x.dtype) if x.dtype != float else np.nan
        out = [np.concatenate([x[n] for n, _ in line]) for line in layout]
        return np.stack([np.concatenate([line, np.full(2 * T + 1 - len(line), fill, x.dtype)]) for line in out])

    segments = np.zeros((N, T), np.int32)
    for line in layout:
        for n, label in line:
            segments[n] = label
    packed = rows.map(place)
    return dataclasses.replace(packed, segments=place(segments)), [n for line in layout for n, _ in line]


def unpack(grads):
    first, second, third = grads[:, 0], grads[:, 1], grads[:, 2]
    cut = {0: first[:, :T], 2: first[:, T : 2 * T], 4: second[:, :T], 1: second[:, T : 2 * T], 3: third[:, :T]}
    return np.stack([cut[n] for n in range(N)], axis=1)


@combinations
@pytest.mark.parametrize("aggregation", slow_but(["seq_mean_token_mean"], ["seq_mean_token_mean", "constant"]))
def test_packing_changes_nothing(surrogate, level, aggregation):
    correction = "tis" if surrogate == "vespo" else "seq_mask"
    config = configure(surrogate, level, aggregation=aggregation, correction=correction)
    rows = make_rows()
    loss, grads, metrics = run(config, rows)
    packed, _ = pack(rows)
    got = run(config, packed)
    assert_same((got[0], unpack(got[1])), (loss, grads))
    assert counted(config, packed, None).sequences == N
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose(got[2][name], (total, count), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("aggregation", algo.AGGREGATIONS)
@pytest.mark.parametrize("correction", [None, *algo.CORRECTIONS])
def test_every_aggregation_and_correction_packs_and_splits(aggregation, correction):
    bounds = dict(correction_low=0.8, correction_high=1.25) if correction else {}
    config = algo.LossConfig(aggregation=aggregation, correction=correction, max_completion_len=LIMIT, **bounds)
    rows = make_rows()
    expected = run(config, rows)
    packed, _ = pack(rows)
    got = run(config, packed)
    assert_same((got[0], unpack(got[1])), expected)
    step = counted(config, rows)
    parts = [run(config, rows.only(np.isin(np.arange(N), part)), step) for part in ([0, 4, 3], [1, 2])]
    assert_same((sum(p[0] for p in parts), sum(p[1] for p in parts)), expected)
    if correction is not None:
        plain = run(dataclasses.replace(config, correction=None), rows)
        assert np.abs(plain[1] - expected[1]).max() > 1e-4


@pytest.mark.parametrize(("surrogate", "level"), [pair for pair in COMBINATIONS if pair[0] != "clip_cov"])
def test_at_the_old_policy_the_gradient_is_that_of_reinforce(surrogate, level):
    """Of every surrogate but clip_cov, which leaves tokens out by design."""
    rows = make_rows()
    rows.arrays["old_logp"] = rows.arrays["logp"]
    config = algo.LossConfig(surrogate=surrogate, ratio_level=level, aggregation="seq_mean_token_sum")
    _, (grads, _), metrics = run(config, rows)
    np.testing.assert_allclose(grads, np.where(rows.mask, -rows.arrays["advantages"] / N, 0), rtol=0, atol=1e-6)
    assert metrics["approx_kl"][0] == 0 and metrics["clip_ratio/region"][0] == 0
    assert metrics["ratio"] == (rows.mask.sum(), rows.mask.sum())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_surrogate_of_your_own_is_taken_like_a_row(level):
    """Written out again, ppo_clip without bounds gives the same loss, gradient and metrics under all else there is."""

    def unclipped(inputs, config):
        return -inputs.ratio * inputs.tokens.advantages

    own = configure(unclipped, level, correction="seq_mask")
    assert hash(own) == hash(dataclasses.replace(own)) and own.has_ratio
    row = configure("ppo_clip", level, correction="seq_mask", clip_low=None, clip_high=None)
    rows = make_rows()
    got, expected = run(own, rows), run(row, rows)
    assert got[0] == expected[0] != 0 and (got[1] == expected[1]).all() and got[2] == expected[2]


UNCLIPPED = {
    "ppo_clip": lambda rho, advantages, logp: -rho * advantages,
    "cispo": lambda rho, advantages, logp: -jax.lax.stop_gradient(rho) * advantages * logp,
    "gmpo": None,
    "dppo": lambda rho, advantages, logp: -jax.lax.stop_gradient(rho) * advantages * logp,
    "clip_cov": None,
}


@pytest.mark.parametrize("bound", [math.inf, None])
@pytest.mark.parametrize("surrogate", UNCLIPPED)
def test_an_infinite_bound_is_none(surrogate, bound):
    rows = make_rows()
    config = algo.LossConfig(surrogate=surrogate, clip_low=bound, clip_high=bound, clip_cov_low=100, clip_cov_high=101)
    loss, grads, metrics = run(config, rows)
    assert metrics["clip_ratio/region"][0] == 0
    tight = run(dataclasses.replace(config, clip_low=0.01, clip_high=0.01), rows)
    assert tight[2]["clip_ratio/low"][0] > 0 and tight[2]["clip_ratio/high"][0] > 0
    assert np.abs(tight[1] - grads).max() > 1e-4
    plain = UNCLIPPED[surrogate]
    if plain is not None:
        arrays = {k: jnp.asarray(np.where(rows.mask, v, 0), jnp.float32) for k, v in rows.arrays.items()}

        def expected(logp):
            rho = jnp.exp(logp - arrays["old_logp"])
            return jnp.sum(plain(rho, arrays["advantages"], logp) * rows.mask) / rows.mask.sum()

        value, slope = jax.value_and_grad(expected)(arrays["logp"])
        assert_same((loss, grads[0]), (value, slope))


def test_the_clip_acts_on_its_own_side_only():
    """rho 0.5, 1.5 against A of both signs: the gradient is there exactly where the step would lead back."""
    config = algo.LossConfig(clip_low=0.2, clip_high=0.3)
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0]])
    old_logp = jnp.log(jnp.array([[2.0, 1 / 1.5, 2.0, 1 / 1.5]]))
    loss, slope = jax.value_and_grad(
        lambda x: algo.policy_loss(x, old_logp, advantages, jnp.ones((1, 4), bool), config)[0]
    )(jnp.zeros((1, 4)))
    np.testing.assert_allclose(slope * 4, [[-0.5, 0.0, 0.0, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(loss, (-0.5 - 1.3 + 0.8 + 1.5) / 4, rtol=1e-6)
    dual = dataclasses.replace(config, dual_clip=1.4)
    assert algo.policy_loss(jnp.zeros((1, 4)), old_logp, advantages, jnp.ones((1, 4), bool), dual)[0] == pytest.approx(
        (-0.5 - 1.3 + 0.8 + 1.4) / 4
    )
    assert run(dual, make_rows(2.0))[0] == run(dataclasses.replace(config, delta=1.4), make_rows(2.0))[0]


def test_metrics_are_means_of_what_they_name():
    rows = make_rows()
    config = algo.LossConfig(kl_coef=0.5, kl_estimator="k1", correction="icepop", correction_low=0.9)
    loss, _, metrics = run(config, rows)
    arrays, mask = {k: np.where(rows.mask, v, 0) for k, v in rows.arrays.items()}, rows.mask
    value = {name: total / count for name, (total, count) in metrics.items()}
    drift, k1 = arrays["logp"] - arrays["old_logp"], arrays["logp"] - arrays["ref_logp"]
    weight = np.exp(arrays["old_logp"] - arrays["sampler_logp"])
    weight = np.where((weight >= 0.9) & (weight <= 5), weight, 0)
    rise = (np.exp(drift) > 1.2) & (arrays["advantages"] > 0)
    fall = (np.exp(drift) < 0.8) & (arrays["advantages"] < 0)
    expected = {
        "loss": loss,
        "policy_loss": loss - 0.5 * k1[mask].mean(),
        "kl": k1[mask].mean(),
        "kl_per_sequence": k1[mask].sum() / N,
        "entropy": arrays["entropy"][mask].mean(),
        "ratio": np.exp(drift)[mask].mean(),
        "approx_kl": (np.exp(drift) - 1 - drift)[mask].mean(),
        "is_weight": weight[mask].mean(),
        "rejected": (weight[mask] == 0).mean(),
        "clip_ratio/low": fall[mask].mean(),
        "clip_ratio/high": rise[mask].mean(),
        "clip_ratio/region": (rise | fall)[mask].mean(),
    }
    assert value.keys() == expected.keys() and all(x != 0 for x in expected.values())
    for name, x in expected.items():
        assert value[name] == pytest.approx(x, abs=2e-6), name


# Extremes.


@combinations
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_ratios_of_ten_thousand(surrogate, level, size):
    rows = make_rows()
    for name, sign in (("old_logp", 1), ("ref_logp", -1), ("sampler_logp", 1)):
        rows.arrays[name] = rows.arrays["logp"] + sign * size
    loss, grads, metrics = run(configure(surrogate, level), rows)
    assert math.isfinite(loss) and np.isfinite(grads).all()
    assert all(math.isfinite(a) for a, _ in metrics.values())


@combinations
def test_nothing_trained_is_exactly_nothing(surrogate, level):
    rows = make_rows().only(np.zeros(N, bool))
    loss, grads, metrics = run(configure(surrogate, level), rows)
    assert loss == 0 and (grads == 0).all()
    assert all(pair == (0, 0) for pair in metrics.values())


@pytest.mark.slow
@combinations
def test_one_row_and_one_token(surrogate, level):
    config = configure(surrogate, level)
    rows = make_rows()
    for part in (lambda x: x[:1], lambda x: x[:, 2:3], lambda x: x[:1, 2:3]):
        small = rows.map(part)
        loss, grads, _ = run(config, small)
        assert math.isfinite(loss) and np.isfinite(grads).all() and (grads[:, ~small.mask] == 0).all()


@spanning
def test_float64_stays_and_bfloat16_becomes_float32(surrogate, level):
    config, rows = configure(surrogate, level), make_rows()
    with jax.enable_x64(True):
        (loss, metrics), _ = gradients(config, rows.arrays, rows.mask, rows.row_ids, rows.positions, None, None)
        assert loss.dtype == jnp.float64 and all(a.dtype == jnp.float64 for a, _ in metrics.values())
    narrow = {k: jnp.asarray(v, jnp.bfloat16) for k, v in rows.arrays.items()}
    (loss, metrics), grads = gradients(config, narrow, rows.mask, rows.row_ids, rows.positions, None, None)
    assert loss.dtype == jnp.float32 and all(a.dtype == jnp.float32 for a, _ in metrics.values())
    assert all(g.dtype == jnp.bfloat16 for g in grads)


# Statistics of the step.


def test_clip_cov_leaves_out_a_share_of_the_eligible_and_kl_cov_picks_the_largest():
    rows = make_rows()
    trained = rows.mask.sum()
    plain = run(algo.LossConfig(), rows)[1][0]
    config = algo.LossConfig(surrogate="clip_cov", clip_cov_share=0.2, clip_cov_low=0.05)
    left_out = (run(config, rows)[1][0] == 0) & (plain != 0)
    assert left_out.sum() == int(0.2 * trained)
    cov = np.where(rows.mask, rows.arrays["advantages"], 0) - rows.arrays["advantages"][rows.mask].mean()
    cov = cov * (rows.arrays["logp"] - rows.arrays["logp"][rows.mask].mean())
    assert (cov[left_out] > 0.05).all() and (cov[left_out] < 5).all()
    unpenalised = run(algo.LossConfig(clip_low=None, clip_high=None), rows)[1][0]
    config = algo.LossConfig(surrogate="kl_cov", kl_cov_share=0.2)
    picked = np.abs(run(config, rows)[1][0] - unpenalised) > 1e-4
    assert picked.sum() == int(0.2 * trained)
    assert np.nanmin(cov[picked]) >= np.max(cov[rows.mask & ~picked])


def test_ties_in_covariance_go_by_row_and_position():
    shape = (3, 4)
    logp, mask = jnp.zeros(shape), jnp.ones(shape, bool)
    old_logp = logp - 0.5
    config = algo.LossConfig(surrogate="kl_cov", kl_cov_share=0.5, kl_cov_coef=7.0)

    def picked(row_ids):
        slope = jax.grad(lambda x: algo.policy_loss(x, old_logp, jnp.zeros(3), mask, config, row_ids=row_ids)[0])(logp)
        return np.asarray(slope) != 0

    np.testing.assert_array_equal(picked(None).sum(1), [4, 2, 0])
    np.testing.assert_array_equal(picked(jnp.array([5, 3, 4])), [[0] * 4, [1] * 4, [1, 1, 0, 0]])


def test_entropy_top_keeps_the_share_and_the_ties():
    entropy = jnp.array([[0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], bool)

    def kept(share):
        config = algo.LossConfig(entropy_top=share, surrogate="reinforce")
        loss = lambda x: algo.policy_loss(x, x, jnp.ones(2), mask, config, entropy=entropy)[0]  # noqa: E731
        return np.asarray(jax.grad(loss)(jnp.zeros((2, 5))) != 0)

    np.testing.assert_array_equal(kept(1.0), mask)
    # Trained: 0, 1, 2, 3, 4, 9. The 0.8 quantile is 4 itself, which is kept; the 0.5 quantile 2.5.
    np.testing.assert_array_equal(kept(0.2), [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(kept(0.5), [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]])
