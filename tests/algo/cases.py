"""Random inputs for the tests of algo/: one seed gives one case, so a failing one is a number to quote."""

import dataclasses

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

FLOAT64 = 1e-9
FLOAT32 = 3e-5
"""Of the largest magnitude in the result: two hundred roundings of 1.2e-7."""
BFLOAT16 = 2.0**-8
"""A gradient handed back in bfloat16 is rounded to eight bits."""


def few(examples):
    return settings(derandomize=True, max_examples=examples)


def assert_close(got, expected, tolerance, floor=0.01):
    """Within tolerance of the largest magnitude expected, and of `floor` where that is smaller."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    scale = max(floor, np.max(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


SHAPES = [(1, 1), (1, 7), (5, 1), (5, 7)]
"""[N, T] of a drawn step: few, since each is compiled, and odd, so that nothing divides by chance."""
GROUPS = [(1, 1), (5, 1), (3, 5), (2, 7)]
"""[Q, G] of drawn rewards."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The arrays of one optimizer step, [N, T]; what mask leaves out holds values too."""

    logp: np.ndarray
    old_logp: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    ref_logp: np.ndarray
    sampler_logp: np.ndarray
    entropy: np.ndarray
    segments: np.ndarray | None = None
    draws: np.ndarray | None = None

    def cast(self, dtype):
        """The floats rounded to dtype, as float64 again."""
        return self.map(lambda x: np.asarray(x.astype(dtype).astype(np.float64)) if x.dtype == np.float64 else x)

    def map(self, function):
        """Every array that is there through function."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Step(**{k: None if v is None else function(v) for k, v in values.items()})


def make_segments(rng, shape):
    """Each row cut into up to three sequences with ids from 1, and padding (0) at its end."""
    rows, columns = shape
    out = np.zeros(shape, np.int32)
    for n in range(rows):
        ends = np.sort(rng.integers(0, columns + 1, 3))
        for i, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            out[n, start:end] = i + 1
    return out


def make_step(seed, shape, *, packed=False, masked="random", drift=0.3, token_advantages=False):
    """drift is the size of every log-ratio; masked is "random", "none", "all" or "row"."""
    rng = np.random.default_rng(seed)
    mask = {"none": np.ones(shape, bool), "all": np.zeros(shape, bool)}.get(masked, rng.random(shape) < 0.7)
    if masked == "row":
        mask[rng.integers(shape[0])] = False
    segments = make_segments(rng, shape) if packed else None
    if packed:
        mask = mask & (segments > 0)
    logp = -rng.exponential(1.0, shape)
    old_logp = logp + drift * rng.normal(size=shape)
    ids = np.zeros(shape, np.int64) if segments is None else segments
    advantages = rng.normal(size=(shape[0], 4)) * rng.choice([0.0, 1.0, 1.0, 1.0], (shape[0], 4))
    if token_advantages:
        advantages = rng.normal(size=shape)
    elif packed:
        advantages = np.take_along_axis(advantages, ids.astype(np.int64), axis=1)
    else:
        advantages = advantages[:, 0]
    return Step(
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        mask=mask,
        ref_logp=logp + drift * rng.normal(size=shape),
        sampler_logp=old_logp + 0.5 * drift * rng.normal(size=shape),
        entropy=rng.exponential(1.0, shape),
        segments=segments,
        draws=rng.random(shape),
    )


def make_rewards(seed, shape, kind):
    """(rewards, valid) of the shape; some samples are not scored, some groups are all the same."""
    rng = np.random.default_rng(seed)
    rewards = {
        "binary": lambda: rng.integers(0, 2, shape).astype(float),
        "normal": lambda: rng.normal(size=shape),
        "few": lambda: rng.choice([0.0, 0.1, 0.5, 2.0], shape),
        "constant": lambda: np.full(shape, 0.1),
        "huge": lambda: rng.choice([-1e30, 1e30], shape),
        "positive": lambda: rng.exponential(size=shape),
    }[kind]()
    flat = rng.random(shape[:-1]) < 0.25
    rewards = np.where(flat[..., None], rewards[..., :1], rewards)
    valid = rng.random(shape) < rng.choice([0.3, 0.8, 1.0])
    return rewards, valid


REWARD_KINDS = ("binary", "normal", "few", "constant", "huge", "positive")


def steps(**fixed):
    """Strategy of keyword arguments of make_step."""
    free = {
        "seed": st.integers(0, 2**31),
        "shape": st.sampled_from(SHAPES),
        "packed": st.booleans(),
        "masked": st.sampled_from(["random", "random", "none", "row", "all"]),
        "drift": st.sampled_from([0.0, 0.01, 0.3, 0.3, 3.0, 1e4]),
    }
    return st.fixed_dictionaries({**free, **{k: st.just(v) for k, v in fixed.items()}})


def x64():
    """float64 inside the with statement, float32 as ever outside."""
    return jax.enable_x64(True)
