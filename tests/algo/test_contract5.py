"""Contract 5 of docs/DESIGN.md: one gradient per optimizer step, however it is cut.

A step is a list of sequences. `lay_out` puts them into rows, in any order, alone or packed, with padding that holds
NaN; whatever the layout and the cut into microbatches, the losses add up to the same number and each token gets the
same gradient, when the denominators of the whole step are passed. All in float64, so that only a real difference shows.
"""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_set import slow_but
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import algo

from .cases import x64

SEQUENCES, LONGEST = 11, 13
FLOATS = ("logp", "old_logp", "advantages", "ref_logp", "sampler_logp", "entropy")
TOLERANCE = 1e-11

STEP_STATISTICS = {
    "clip_cov": {"surrogate": "clip_cov", "clip_cov_low": -0.5, "clip_cov_high": 0.5, "clip_cov_share": 0.3},
    "kl_cov": {"surrogate": "kl_cov", "kl_cov_share": 0.13},
    "kl_cov with ties": {"surrogate": "kl_cov", "kl_cov_share": 0.13},
    "entropy_top": {"entropy_top": 0.3719, "entropy_coef": 0.01},
    "entropy_top and clip_cov": {"surrogate": "clip_cov", "clip_cov_low": -5.0, "entropy_top": 0.5},
}
TOGETHER = {
    "sequence level with everything": {
        "ratio_level": "sequence",
        "dual_clip": 1.5,
        "kl_coef": 0.1,
        "kl_estimator": "k3_unbiased",
        "correction": "seq_mask",
        "veto": 0.4,
        "off_policy_threshold": 0.02,
        "entropy_top": 0.6173,
        "entropy_coef": 0.01,
        "aggregation": "seq_mean_token_mean",
    },
    "vespo with icepop": {"surrogate": "vespo", "correction": "icepop", "correction_low": 0.8, "correction_high": 1.2},
    "gmpo, geo_mask": {"surrogate": "gmpo", "correction": "geo_mask", "correction_low": 0.9, "correction_high": 1.1},
    "cispo of sequences": {"surrogate": "cispo", "ratio_level": "sequence", "aggregation": "constant"},
    "dppo with tis": {"surrogate": "dppo", "correction": "tis", "kl_coef": 0.1, "kl_estimator": "abs"},
}
CONFIGS = {
    **{name: algo.LossConfig.preset(name) for name in sorted(algo.PRESETS)},
    **{name: algo.LossConfig(**{"max_completion_len": 13, **o}) for name, o in {**STEP_STATISTICS, **TOGETHER}.items()},
}
SPANNING = (
    "ppo",
    "gspo",
    "dapo",
    "clip_cov",
    "kl_cov with ties",
    "sequence level with everything",
    "vespo with icepop",
    "gmpo, geo_mask",
)
"""Every ratio level, aggregation, correction and statistic of the step in eight configs: the fast set's."""
every_config = pytest.mark.parametrize("name", slow_but(SPANNING, CONFIGS))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Arrays [rows, width], or microbatches of them, and where each sequence's tokens lie: (row, first column)."""

    arrays: dict
    at: dict

    def gather(self, gradient):
        """A gradient [rows, width] as one row per sequence, [SEQUENCES, LONGEST]; all else in it must be 0."""
        out = np.zeros((SEQUENCES, LONGEST))
        rest = np.array(gradient)
        for i, (row, first) in self.at.items():
            length = min(LONGEST, rest.shape[1] - first)
            inside = np.arange(length) < LENGTHS[i]
            out[i, :length] = np.where(inside, rest[row, first : first + length], 0.0)
            rest[row, first : first + length][inside] = 0.0
        assert (rest == 0).all()
        return out


LENGTHS = np.array([13, 7, 5, 11, 3, 8, 13, 4, 1, 6, 9])
PROMPTS = np.array([2, 3, 1, 4, 3, 2, 5, 1, 0, 2, 3])
"""Tokens of each sequence, and how many of them are its prompt; sequence 4 has nothing trained."""


@cache
def make_sequences(name):
    """The step [SEQUENCES, LONGEST]; ties quantises logp and advantages so that many covariances are equal."""
    rng = np.random.default_rng(5)
    shape = (SEQUENCES, LONGEST)
    columns = np.arange(LONGEST)
    mask = (columns >= PROMPTS[:, None]) & (columns < LENGTHS[:, None]) & (rng.random(shape) < 0.9)
    mask[4] = False
    logp = -rng.exponential(1.0, shape)
    advantages = np.repeat(rng.normal(size=(SEQUENCES, 1)), LONGEST, axis=1)
    if name == "ppo":
        advantages = rng.normal(size=shape)
    if "ties" in name:
        logp, advantages = np.floor(logp), np.sign(advantages)
    old = logp + 0.3 * rng.normal(size=shape)
    return {
        "logp": logp,
        "old_logp": old,
        "advantages": advantages,
        "mask": mask,
        "ref_logp": logp + 0.3 * rng.normal(size=shape),
        "sampler_logp": old + 0.1 * rng.normal(size=shape),
        "entropy": rng.exponential(1.0, shape),
    }


def lay_out(step, rows, width, *, packed=False, ids=True):
    """rows: lists of sequences, one of at most one sequence unless packed; what is left over is NaN and not masked."""
    shape = (len(rows), width)
    arrays = {name: np.full(shape, np.nan) for name in FLOATS}
    arrays["mask"] = np.zeros(shape, bool)
    extra = {"segments": np.zeros(shape, np.int32)} if packed else {}
    if ids:
        extra |= {"row_ids": np.zeros(shape, np.int32), "positions": np.zeros(shape, np.int32)}
    at = {}
    for r, members in enumerate(rows):
        first = 0
        for number, i in enumerate(members):
            n = LENGTHS[i]
            for name in (*FLOATS, "mask"):
                arrays[name][r, first : first + n] = step[name][i, :n]
            values = {"segments": number + 1, "row_ids": i, "positions": np.arange(n)}
            for name in extra:
                extra[name][r, first : first + n] = values[name]
            at[i] = (r, first)
            first += n
    return Layout({**arrays, **extra}, at)


def plain(step, width=LONGEST, count=SEQUENCES):
    return lay_out(step, [[i] if i < SEQUENCES else [] for i in range(count)], width, ids=False)


def loss_and_gradient(config, arrays, denominators=None, choice=None):
    """(loss, gradients in logp and entropy, metrics) of one call."""
    rest = {k: v for k, v in arrays.items() if k not in ("logp", "old_logp", "advantages", "mask", "entropy")}

    def loss(logp, entropy):
        main = (logp, arrays["old_logp"], arrays["advantages"], arrays["mask"])
        more = dict(denominators=denominators, choice=choice, key=jax.random.key(3))
        return algo.policy_loss(*main, config=config, entropy=entropy, **more, **rest)

    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(arrays["logp"], arrays["entropy"])
    return value, grads, metrics


def count_step(config, arrays, sequences=None):
    names = ("segments", "logp", "old_logp", "advantages", "entropy", "row_ids", "positions")
    given = {k: jnp.asarray(arrays[k]) for k in names if k in arrays}
    key = jax.random.key(3)
    return algo.denominators(config, jnp.asarray(arrays["mask"]), sequences=sequences, key=key, **given)


@cache
def whole(name):
    """The step in one call, nothing passed but its arrays: (loss, gradients by sequence, metrics, denominators)."""
    with x64():
        layout = plain(make_sequences(name))
        value, grads, metrics = loss_and_gradient(CONFIGS[name], jax.tree.map(jnp.asarray, layout.arrays))
        counts = count_step(CONFIGS[name], layout.arrays)
        assert np.isfinite(value) and value.dtype == jnp.float64
        return float(value), [layout.gather(g) for g in grads], _numbers(metrics), counts


def _numbers(metrics):
    return {k: (float(s), float(c)) for k, (s, c) in metrics.items()}


def assert_same(name, value, grads, metrics):
    expected_value, expected_grads, expected_metrics, _ = whole(name)
    np.testing.assert_allclose(value, expected_value, rtol=TOLERANCE, atol=TOLERANCE)
    for got, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=TOLERANCE)
    assert metrics.keys() == expected_metrics.keys()
    for key, (total, count) in metrics.items():
        np.testing.assert_allclose((total, count), expected_metrics[key], rtol=1e-9, atol=1e-9, err_msg=key)


def in_parts(name, layout, part, counts=None, choice=None):
    """The layout in microbatches of `part` rows: summed losses, gradients by sequence, summed metrics."""
    with x64():
        arrays = jax.tree.map(jnp.asarray, layout.arrays)
        counts = whole(name)[3] if counts is None else counts
        value, grads, metrics = 0.0, [], []
        for start in range(0, len(layout.arrays["mask"]), part):
            cut, chosen = jax.tree.map(lambda x: x[start : start + part], (arrays, choice))  # noqa: B023
            loss, gradient, sums = loss_and_gradient(CONFIGS[name], cut, counts, chosen)
            value += float(loss)
            grads.append(gradient)
            metrics.append(_numbers(sums))
        gathered = [layout.gather(np.concatenate([np.asarray(g) for g in each])) for each in zip(*grads, strict=True)]
        added = {k: tuple(np.sum([m[k] for m in metrics], axis=0)) for k in metrics[0]}
        return value, gathered, added


def random_rows(seed, slots):
    """The sequences in random order, one to a row, then empty rows up to `slots`."""
    order = np.random.default_rng(seed).permutation(SEQUENCES)
    return [[int(i)] for i in order] + [[] for _ in range(slots - SEQUENCES)]


def random_packing(seed, count):
    """Every sequence in one of `count` rows, in random order; one without trained tokens is left out."""
    rng = np.random.default_rng(seed)
    rows = [[] for _ in range(count)]
    for i in rng.permutation([i for i in range(SEQUENCES) if i != 4]):
        fits = [r for r in rows if sum(LENGTHS[r]) + LENGTHS[i] <= 29]
        fits[rng.integers(len(fits))].append(int(i))
    return rows


@every_config
def test_the_gradient_is_not_nothing(name):
    value, grads, _, counts = whole(name)
    trained = int(make_sequences(name)["mask"].sum())
    assert value != 0 and np.count_nonzero(grads[0]) > trained / 4
    assert int(counts.tokens) == trained and int(counts.sequences) == SEQUENCES


@every_config
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_microbatches_row_order_and_padding(name, seed):
    """Four microbatches of four rows, wider than need be, one of them all masked."""
    rows = random_rows(seed, 12)
    empty = 4 * int(np.random.default_rng(seed).integers(4))
    layout = lay_out(make_sequences(name), rows[:empty] + [[]] * 4 + rows[empty:], LONGEST + 4)
    assert not layout.arrays["mask"][empty : empty + 4].any()
    assert_same(name, *in_parts(name, layout, 4))


@every_config
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_packing(name, seed):
    """Packed rows in two microbatches; the sequence with nothing trained is in no row and still counts."""
    layout = lay_out(make_sequences(name), random_packing(seed, 4), 29, packed=True)
    assert_same(name, *in_parts(name, layout, 2))


@every_config
def test_denominators_do_not_depend_on_the_layout(name):
    with x64():
        expected = whole(name)[3]
        step = make_sequences(name)
        shuffled = lay_out(step, random_rows(3, 16), LONGEST + 4)
        packed = lay_out(step, random_packing(3, 4), 29, packed=True)
        for layout in (shuffled, packed):
            got = count_step(CONFIGS[name], layout.arrays, sequences=SEQUENCES)
            for field, g, e in zip(expected._fields, got, expected, strict=True):
                assert (g is None) == (e is None)
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, err_msg=field), g, e)  # noqa: B023


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", slow_but(["clip_cov", "kl_cov with ties", "entropy_top"], STEP_STATISTICS))
def test_a_choice_made_for_the_step_is_cut_like_it(name, packed):
    """With it the denominators need no statistics, and what is not trained is not chosen."""
    rows, width = (random_packing(5, 4), 29) if packed else (random_rows(5, 12), LONGEST + 4)
    layout, config = lay_out(make_sequences(name), rows, width, packed=packed), CONFIGS[name]
    with x64():
        arrays = jax.tree.map(jnp.asarray, layout.arrays)
        given = {k: v for k, v in arrays.items() if k not in ("mask", "ref_logp", "sampler_logp")}
        choice = algo.choose(config, arrays["mask"], key=jax.random.key(3), **given)
        counts = algo.denominators(config, arrays["mask"], sequences=SEQUENCES)
    assert config.chooses and (choice.picked is None) == (config.surrogate == "ppo_clip")
    assert (choice.kept is None) == (config.entropy_top == 1)
    for chosen in jax.tree.leaves(choice):
        assert 0 < (chosen & arrays["mask"]).sum() < arrays["mask"].sum()
    assert choice.picked is None or not (choice.picked & ~arrays["mask"]).any()
    assert_same(name, *in_parts(name, layout, 2 if packed else 4, counts, choice))


def test_the_value_loss_is_one_however_it_is_cut():
    """Five rows at once, and as microbatches of two rows, one of them all masked, in another order."""
    rng = np.random.default_rng(7)
    values, old, returns = rng.normal(size=(3, 5, LONGEST))
    mask = rng.random((5, LONGEST)) < 0.6
    mask[3] = False

    def step(rows, counts=None):
        main = [jnp.asarray(x[rows]) for x in (old, returns, mask)]
        function = lambda v: algo.value_loss(v, *main, clip=0.2, denominators=counts)  # noqa: E731
        (value, metrics), grad = jax.value_and_grad(function, has_aux=True)(jnp.asarray(values[rows]))
        return float(value), np.asarray(grad), _numbers(metrics)

    with x64():
        value, grad, metrics = step(np.arange(5))
        counts = algo.denominators(algo.LossConfig(), jnp.asarray(mask))
        parts = [step(np.array(rows), counts) for rows in ([4, 0], [3], [2, 1])]
    np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), grad[[4, 0, 3, 2, 1]], rtol=1e-12)
    assert value > 0 and (parts[1][1] == 0).all()
    for name, pair in metrics.items():
        np.testing.assert_allclose(np.sum([p[2][name] for p in parts], axis=0), pair, rtol=1e-12, err_msg=name)


@every_config
def test_eight_devices_are_one(name):
    """Rows spread over eight devices, two on each; only sums travel between them."""
    with x64():
        devices = jax.devices()
        assert len(devices) >= 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported"
        rows = NamedSharding(Mesh(np.array(devices[:8]), ("data",)), PartitionSpec("data"))
        layout = lay_out(make_sequences(name), random_rows(4, 16), LONGEST)
        arrays = {k: jax.device_put(v, rows) for k, v in layout.arrays.items()}
        compiled = _sharded.lower(CONFIGS[name], arrays, whole(name)[3]).compile()
        assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
        value, grads, metrics = compiled(arrays, whole(name)[3])
        for x in (*arrays.values(), grads[0]):
            assert {s.data.shape for s in x.addressable_shards} == {(2, LONGEST)} and len(x.addressable_shards) == 8
        gathered = [layout.gather(g) for g in grads]
        assert_same(name, float(value), gathered, _numbers(metrics))


@pytest.mark.parametrize("name", ["entropy_top and clip_cov", "kl_cov with ties"])
def test_statistics_over_eight_devices_are_those_of_one(name):
    with x64():
        rows = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
        layout = lay_out(make_sequences(name), random_rows(5, 16), LONGEST)
        arrays = {k: jax.device_put(v, rows) for k, v in layout.arrays.items()}
        got = jax.jit(count_step, static_argnums=0)(CONFIGS[name], arrays, SEQUENCES)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), got, whole(name)[3])


_sharded = jax.jit(loss_and_gradient, static_argnums=0)
