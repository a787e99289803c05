"""Windows, soft-caps, penalties and bans where rows really change slots, or wait for one: contracts 3 and 4."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import PROMPTS, assert_same_but_for_boundaries, completions, learner_logp

from grpo_jax.mesh import make_mesh
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.rollout.sampling import row_keys, split_ids, uniforms
from grpo_jax.rollout.shapes import Shape
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt, Rollout

ASKED = [Prompt(i, tuple(p)) for i, p in enumerate(PROMPTS)]
SAMPLES = 4
SCHEDULES = {"cohort": None, "refill": 6}
"""Slots: rows that all start and close up, and rows that wait for those."""
STOPS = tuple(range(1, 6))


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def windows():
    """Two layers, one of them with a window of 4, and caps on what attention scores and on the logits."""
    shape = {"head_dim": 8, "query_pre_attn_scalar": 11, "sliding_window": 4}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
    return tiny_model(scale=3.0, model_type="gemma2", **shape, **caps)


def sampled(
    model, params, asked: Sequence[Prompt], sampling: Sampling, slots: int | None = None, samples: int = SAMPLES, **more
) -> tuple[Rollout, tuple[Shape, ...]]:
    """All rows, and the shapes they decoded in."""
    engine = ContinuousEngine(model, 16, slots)
    call = engine.stream(params, asked, num_samples=samples, sampling=sampling, seed=0, step=0, **more)
    for _ in call:
        pass
    return call.sampled.rollout(np.arange(len(asked) * samples)), call.counts.shapes


def assert_moved(shapes: Sequence[Shape], slots: int | None) -> None:
    """Rows lay on prompts unevenly, and closed up; those that waited were taken in."""
    assert len(set(shapes)) > 1 and not all(shape.even for shape in shapes)
    assert slots is None or shapes.count(shapes[0]) > 3


@pytest.fixture(scope="module")
def windowed(windows):
    sampling = Sampling(0.7, max_new_tokens=30, stop_ids=STOPS)
    return {name: sampled(*windows, ASKED, sampling, slots) for name, slots in SCHEDULES.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_contract_3_windows_and_caps_where_rows_move(windows, windowed, name):
    rollout, shapes = windowed[name]
    assert_moved(shapes, SCHEDULES[name])
    gap = np.abs(learner_logp(*windows, rollout, 0.7) - rollout.sampler_logp)[rollout.completion_mask]
    assert gap.size > 150 and rollout.completion_len.max() > 12  # far beyond the window
    assert gap.mean() <= 1e-5 and gap.max() <= 1e-4


def test_contract_4_windows_and_caps_where_rows_move(windows, windowed):
    one, other = (windowed[name][0] for name in SCHEDULES)
    assert_same_but_for_boundaries(*windows, one, other, range(len(ASKED)), SAMPLES, 0.7)
    assert np.mean([a == b for a, b in zip(completions(one), completions(other), strict=True)]) > 0.8


RULES = Sampling(
    0.8, max_new_tokens=30, stop_ids=STOPS, min_tokens=4, banned_ids=(10, 11), min_p=0.05,
    repetition_penalty=1.3, presence_penalty=0.7,
)  # fmt: skip


@pytest.mark.parametrize(("slots", "devices"), [(None, 1), (6, 1), (6, 2)])
def test_penalties_bans_and_least_tokens_as_in_numpy(tiny, slots, devices):
    model, params = tiny
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    rollout, shapes = sampled(*tiny_model(mesh, num_hidden_layers=1), ASKED, RULES, slots)
    assert_moved(shapes, slots)
    logits = np.asarray(model.logits(params, rollout.tokens), np.float64)
    keys = row_keys(0, jnp.uint32(0), jnp.asarray(split_ids(range(len(ASKED)))), SAMPLES)
    places = jnp.arange(RULES.max_new_tokens)
    u = np.asarray([uniforms(jnp.repeat(keys[n : n + 1], len(places)), places) for n in range(len(keys))], np.float64)
    assert rollout.drawn_logp is not None and rollout.completion_mask.sum() > 150
    for n, ids in enumerate(completions(rollout)):
        start = int(rollout.prompt_len[n])
        for i, token in enumerate(ids):
            row = logits[n, start + i - 1]
            assert abs(rollout.sampler_logp[n, start + i] - log_softmax(row / 0.8)[token]) < 1e-4
            p = drawn(row, rollout.tokens[n, : start + i], ids[:i])
            assert abs(rollout.drawn_logp[n, start + i] - np.log(p[token])) < 1e-4
            ends = np.cumsum(p)
            assert ends[token] - p[token] - 1e-5 <= u[n, i] <= ends[token] + 1e-5


def drawn(logits: np.ndarray, text: np.ndarray, own: list[int]) -> np.ndarray:
    """The probabilities that `RULES` leaves."""
    logits = logits.copy()
    for token in set(text.tolist()):
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    for token in set(own):
        logits[token] -= 0.7
    logits[[10, 11]] = -np.inf
    if len(own) < 4:
        logits[list(STOPS)] = -np.inf
    p = np.exp(log_softmax(logits / 0.8))
    p[p < 0.05 * p.max()] = 0
    return p / p.sum()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
