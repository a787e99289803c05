"""Completions -> rewards [Q, G] by function, shaped and weighted, -> advantages and the mask of what is trained."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo
from grpo_jax.config import AlgorithmConfig, TrainConfig
from grpo_jax.data import decode
from grpo_jax.mesh import from_first
from grpo_jax.rewards import RewardPool
from grpo_jax.types import Prompt, Rollout


@dataclass(frozen=True)
class Scored:
    """One rollout, judged.

    Attributes:
        completions: N texts.
        by_function: [F, N] float32, NaN where a function gave no answer.
        reward: [Q, G] float32, weighted and shaped; 0 where not scored.
        scored: [Q, G] bool, some function answered.
        spread: [Q] bool, the group's weighted rewards, before shaping, differ.
        advantages: [N] float32.
        mask: [N, T] bool, True where trained.
        warnings: what went wrong in the reward functions.
    """

    completions: list[str]
    by_function: np.ndarray
    reward: np.ndarray
    scored: np.ndarray
    spread: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Scorer:
    """Judges rollouts.

    Attributes:
        pool: the reward functions; None on every process but the first, which asks them and tells the others.
        tokenizer: turns completions into the text the functions see.
        stop_ids: tokens that end a completion and are no part of its text.
        config: of the run.
    """

    pool: RewardPool | None
    tokenizer: Any
    stop_ids: frozenset[int]
    config: TrainConfig

    def rewards(self, prompts: list[Prompt], rollout: Rollout) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
        """Completions as text, rewards [F, N] and warnings; columns of the data set arrive repeated per sample."""
        samples = rollout.tokens.shape[0] // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        ids = [rollout.completion_ids(n) for n in range(len(repeated))]
        texts = [decode(self.tokenizer, row, self.stop_ids) for row in ids]
        names = sorted({name for prompt in prompts for name in prompt.columns or {}})
        columns = {name: [(prompt.columns or {}).get(name) for prompt in repeated] for name in names}
        by_function, warnings = np.zeros((len(self.config.reward.functions), len(repeated))), tuple[str, ...]()
        if self.pool is not None:
            scores = self.pool.score([prompt.text for prompt in repeated], texts, ids, columns)
            by_function, warnings = scores.rewards, scores.warnings
        return texts, from_first(by_function.astype(np.float32)), warnings

    def score(self, prompts: list[Prompt], rollout: Rollout) -> Scored:
        """Rewards, then advantages and what is trained.

        Raises:
            ValueError: a weighted reward that float32 cannot hold.
        """
        texts, by_function, warnings = self.rewards(prompts, rollout)
        shape = (len(by_function), len(prompts), -1)
        weights = np.asarray(self.config.reward.weights or (1.0,) * len(by_function), np.float32)
        out = _judge(
            self.config.algorithm,
            self.config.rollout.max_new_tokens,
            by_function.reshape(shape),
            weights,
            rollout.completion_len.reshape(shape[1:]),
        )
        reward, scored, spread, advantages = jax.device_get(out)
        if not np.isfinite(reward).all():
            row = int(np.argmin(np.isfinite(reward)))
            raise ValueError(
                f"reward.weights: the weighted sum of {by_function[:, row].tolist()} is beyond float32. "
                "Use smaller weights or rewards."
            )
        mask = rollout.completion_mask
        if self.config.algorithm.overlong_filter:
            mask = mask & (rollout.finish != "length")[:, None]
        return Scored(texts, by_function, reward, scored, spread, advantages.reshape(-1), mask, warnings)


@partial(jax.jit, static_argnums=(0, 1))
def _judge(
    config: AlgorithmConfig, limit: int, rewards: jax.Array, weights: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rewards [F, Q, G] with NaN for no answer -> reward, scored, spread, advantages."""
    reward, scored = algo.combine_rewards(rewards, weights, valid=jnp.isfinite(rewards))
    spread = algo.has_spread(reward, scored)
    if config.soft_overlong:
        reward = reward + algo.soft_overlong(lengths, limit, buffer_len=config.overlong_buffer_len)
    reward = jnp.where(scored, reward, 0.0)
    assert config.advantage != "gae"  # refused by the config
    advantages = algo.group_advantages(
        reward, estimator=config.advantage, valid=scored, lengths=lengths, ddof=config.ddof, eps=config.eps
    )
    return reward, scored, spread, advantages
