"""A rollout made without a model, its rewards, and the `Learning` of a config: steps without engine or tokenizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.collect import Collected
from grpo_jax.config import TrainConfig
from grpo_jax.learner.learning import Learning, layout_of
from grpo_jax.mesh import make_mesh
from grpo_jax.metrics import Phases
from grpo_jax.models import Model
from grpo_jax.scoring import Answers, Scorer
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt, Rollout

QUESTIONS, SAMPLES, PROMPT_LEN, LIMIT = 4, 4, 3, 5
SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 23,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
}
PLAIN = {"learning_rate": 0.5, "eps": 1.0, "max_grad_norm": None}
"""AdamW with an eps that dwarfs the gradient is gradient descent, so that float noise stays as small as it is."""


def config_for(preset: str = "grpo", **tables: Any) -> TrainConfig:
    """A config of the smallest shapes; ``algorithm`` and the other tables go over it."""
    base: dict[str, Any] = {
        "steps": 4,
        "rollout": {"prompts_per_step": QUESTIONS, "num_samples": SAMPLES, "max_new_tokens": LIMIT},
        "reward": {"functions": ["a", "b"], "weights": [1.0, 0.5]},
        "optim": PLAIN,
    }
    for name, table in {"algorithm": {}, **tables}.items():
        if name == "algorithm":
            table = {"preset": preset, **table}
        base[name] = base.get(name, {}) | table
    if base["algorithm"]["preset"] == "ppo":
        base["critic"] = PLAIN | base.get("critic", {})
    return TrainConfig.from_tables(base)


@functools.cache
def small_model(devices: int) -> tuple[Model, Any]:
    """A model of one layer on ``devices`` devices, parameters over half of them."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1]) if devices == 1 else make_mesh(2, devices // 2, 1)
    return tiny_model(mesh, **SMALL)


def learning_for(config: TrainConfig, devices: int = 1) -> Learning:
    """From the same parameters on any number of devices."""
    model, params = small_model(devices)
    params = copied(params)
    return Learning(config, model, params, layout_of(config, model, PROMPT_LEN), Phases())


def rollout_for(seed: int = 0) -> Rollout:
    """N = 16 rows; lengths from 0 to the limit, log-probabilities near a flat distribution's."""
    draw = np.random.default_rng(seed)
    rows = QUESTIONS * SAMPLES
    prompt_len = np.repeat(draw.integers(1, PROMPT_LEN + 1, QUESTIONS), SAMPLES).astype(np.int32)
    completion_len = draw.integers(0, LIMIT + 1, rows).astype(np.int32)
    completion_len[:2] = LIMIT, 1
    tokens = draw.integers(2, SMALL["vocab_size"], (rows, PROMPT_LEN + LIMIT)).astype(np.int32)
    prompts = draw.integers(2, SMALL["vocab_size"], (QUESTIONS, PROMPT_LEN + LIMIT)).repeat(SAMPLES, 0)
    column = np.arange(tokens.shape[1])
    start, end = prompt_len[:, None], (prompt_len + completion_len)[:, None]
    tokens = np.where(column < start, prompts, np.where(column < end, tokens, 0)).astype(np.int32)
    logp = np.where((column >= start) & (column < end), draw.normal(-3, 0.3, tokens.shape), 0).astype(np.float32)
    finish = np.where(completion_len == LIMIT, "length", "stop")
    return Rollout(tokens, prompt_len, completion_len, logp, finish)


def collected_for(config: TrainConfig, seed: int = 0, counted: Any = None) -> Collected:
    """The rollout of ``seed`` judged: two reward functions, one silent now and then; one group without spread."""
    draw = np.random.default_rng([seed, 1])
    rollout = rollout_for(seed)
    rewards = draw.integers(0, 2, (2, QUESTIONS * SAMPLES)).astype(np.float32)
    rewards[0, :SAMPLES] = [1, 0, 0, 1]
    rewards[:, SAMPLES : 2 * SAMPLES] = 1.0
    rewards[0, 3], rewards[:, 9] = np.nan, np.nan
    greedy = np.asarray([[1, 0, np.nan, 1], [0, 1, np.nan, np.nan]], np.float32)
    scorer = Scorer(None, None, frozenset(), config)
    answers = Answers([""] * rewards.shape[1], rewards)
    everything = np.ones(QUESTIONS, bool) if counted is None else np.asarray(counted)
    scored = scorer.judge(rollout, answers, everything, greedy if config.algorithm.advantage == "remax" else None)
    return Collected([Prompt(q, (2,)) for q in range(QUESTIONS)], rollout, scored, {}, ())


def copied(tree: Any) -> Any:
    """The same arrays in buffers of their own."""
    return jax.tree.map(jnp.copy, tree)


def moved(before: Any, after: Any) -> list[np.ndarray]:
    """What each array changed by, in float64."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [np.asarray(b, np.float64) - np.asarray(a, np.float64) for a, b in pairs]


def assert_same_update(one: list[np.ndarray], other: list[np.ndarray], tolerance: float = 2e-5) -> None:
    """Two updates agree to float tolerance, relative to the larger's largest entry, which is not nothing."""
    scale = max(np.abs(x).max() for x in one)
    assert scale > 1e-5
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * scale)
