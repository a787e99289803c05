"""Completions -> rewards [Q, G] by function, shaped and weighted, -> advantages and the mask of what is trained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo
from grpo_jax.algo.spec import Estimator
from grpo_jax.config import AlgorithmConfig, TrainConfig
from grpo_jax.data import decode
from grpo_jax.functions import load_function
from grpo_jax.mesh import from_first
from grpo_jax.rewards import RewardPool, TrainerState
from grpo_jax.rewards.call import Batch
from grpo_jax.rewards.lookup import Reward
from grpo_jax.types import Prompt, Rollout


def pool_from(config: TrainConfig, functions: Sequence[str | Reward]) -> RewardPool:
    """The reward functions of a run, as ``reward.*`` says.

    Args:
        config: of the run.
        functions: those that ``reward.functions`` names, or objects in their place.
    """
    return RewardPool(
        functions,
        config.reward.timeout_seconds,
        config.reward.memory_limit_mb,
        config.reward.options,
        TrainerState(max_steps=config.steps, max_completion_len=config.rollout.max_new_tokens),
        config.reward.stream,
        config.reward.workers,
        config.reward.environment,
    )


@dataclass(frozen=True)
class Answers:
    """What the reward functions said of a rollout.

    Attributes:
        completions: N texts.
        by_function: [F, N] float32, NaN where a function gave no answer.
        warnings: what went wrong in the reward functions.
        extra: columns of N values that the functions logged, by name.
        metrics: figures that the functions logged, by name.
    """

    completions: list[str]
    by_function: np.ndarray
    warnings: tuple[str, ...] = ()
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> "Answers":
        """Those of some rows; figures stay."""
        extra = {name: [values[n] for n in rows] for name, values in self.extra.items()}
        texts = [self.completions[n] for n in rows]
        return Answers(texts, self.by_function[:, rows], self.warnings, extra, self.metrics)

    @staticmethod
    def join(parts: "Sequence[Answers]") -> "Answers":
        """Of several rollouts, one behind the other; a column that a part lacks is None there, figures are averaged."""
        names = dict.fromkeys(name for part in parts for name in part.extra)
        lacking = [[None] * len(part.completions) for part in parts]
        extra = {
            name: [value for part, none in zip(parts, lacking, strict=True) for value in part.extra.get(name, none)]
            for name in names
        }
        figures: dict[str, list[float]] = {}
        for part in parts:
            for name, value in part.metrics.items():
                figures.setdefault(name, []).append(value)
        return Answers(
            [text for part in parts for text in part.completions],
            np.concatenate([part.by_function for part in parts], axis=1),
            tuple(dict.fromkeys(warning for part in parts for warning in part.warnings)),
            extra,
            {name: sum(values) / len(values) for name, values in figures.items()},
        )


@dataclass(frozen=True)
class Scored:
    """One rollout, judged.

    Attributes:
        completions: N texts.
        by_function: [F, N] float32, NaN where a function gave no answer.
        reward: [Q, G] float32, weighted and shaped; 0 where not scored.
        scored: [Q, G] bool, some function answered.
        spread: [Q] bool, the group's weighted rewards, before shaping, differ.
        advantages: [N] float32; 0 where they wait for the learner (`AlgorithmConfig.waits_for_learner`).
        mask: [N, T] bool, True where trained.
        counted: [Q] bool, groups of this step; the others only fill the batch's shape and are in no denominator.
        warnings: what went wrong in the reward functions.
        extra: columns of N values that the functions logged, by name.
        metrics: figures that the functions logged, by name.
        greedy: [Q] float32, weighted reward of each prompt's greedy completion, NaN for none; None unless remax asks.
    """

    completions: list[str]
    by_function: np.ndarray
    reward: np.ndarray
    scored: np.ndarray
    spread: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    counted: np.ndarray
    warnings: tuple[str, ...] = ()
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    greedy: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """[Q, G] bool: samples that statistics of the rewards are made of."""
        return self.scored & self.counted[:, None]


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

    def rewards(
        self,
        prompts: list[Prompt],
        rollout: Rollout,
        state: TrainerState | None = None,
        only: Collection[int] | None = None,
    ) -> Answers:
        """Completions as text, and what the functions say of them.

        To the functions, columns of the data set arrive repeated per sample, and the completion of a prompt that is
        chat messages as one message of the assistant.

        Args:
            prompts: Q prompts.
            rollout: their samples.
            state: how far the run is, for functions that look at it; None for before its first step.
            only: places of the functions to ask, the others give no answer; None for all.
        """
        with self.begin(prompts, rollout.tokens.shape[0] // len(prompts), state, only) as asking:
            return asking.finish(rollout)

    def begin(
        self,
        prompts: list[Prompt],
        samples: int,
        state: TrainerState | None = None,
        only: Collection[int] | None = None,
    ) -> "Asking":
        """As `rewards`, for a rollout of ``samples`` a prompt whose groups are handed over as they are done."""
        return Asking(self, prompts, samples, state, only)

    def spread(self, answers: Answers, prompt_count: int) -> np.ndarray:
        """[Q] bool: the group's weighted rewards, before shaping, differ (or those of ``algorithm.spread_of``)."""
        by_function = answers.by_function.reshape(len(answers.by_function), prompt_count, -1)
        named = self.config.algorithm.spread_of
        if named is not None:
            place = self.config.reward.functions.index(named)
            by_function, weights = by_function[place : place + 1], np.ones(1, np.float32)
        else:
            weights = self._weights(len(by_function))
        return np.asarray(_spread(by_function, weights))

    def judge(
        self, rollout: Rollout, answers: Answers, counted: np.ndarray, greedy: np.ndarray | None = None
    ) -> Scored:
        """Rewards -> advantages and what is trained.

        Args:
            rollout: N = Q * G rows.
            answers: of all of them.
            counted: [Q] bool; groups that are False have no advantage, train nothing and are in no statistic.
            greedy: [F, Q] rewards of one greedy completion per prompt, NaN for no answer; for remax.

        Raises:
            ValueError: a weighted reward that float32 cannot hold.
        """
        by_function = answers.by_function
        shape = (len(by_function), len(counted), -1)
        out = _judge(
            self.config.algorithm,
            self.config.rollout.max_new_tokens,
            by_function.reshape(shape),
            self._weights(len(by_function)),
            rollout.completion_len.reshape(shape[1:]),
            counted,
            greedy,
        )
        reward, scored, spread, advantages, greedy = jax.device_get(out)
        if not np.isfinite(reward).all():
            row = int(np.argmin(np.isfinite(reward)))
            raise ValueError(
                f"reward.weights: the weighted sum of {by_function[:, row].tolist()} is beyond float32. "
                "Use smaller weights or rewards."
            )
        mask = rollout.completion_mask & np.repeat(counted, reward.shape[1])[:, None]
        if self.config.algorithm.overlong_filter:
            mask = mask & (rollout.finish != "length")[:, None]
        advantages = advantages.reshape(-1)
        said = (answers.warnings, answers.extra, answers.metrics)
        judged = (reward, scored, spread, advantages, mask, counted)
        return Scored(answers.completions, by_function, *judged, *said, greedy)

    def _weights(self, count: int) -> np.ndarray:
        return np.asarray(self.config.reward.weights or (1.0,) * count, np.float32)


class Asking:
    """The reward functions at work on one rollout; `add` groups that are done, in any order, and `finish` with all.

    A context manager: leaving it by an error ends what the functions still do.
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: list[Prompt],
        samples: int,
        state: TrainerState | None,
        only: Collection[int] | None,
    ):
        """Nothing is asked yet."""
        self._scorer, self._prompts, self._samples = scorer, prompts, samples
        self._scoring = None if scorer.pool is None else scorer.pool.begin(only)
        self._state = state or (TrainerState() if scorer.pool is None else scorer.pool.state)
        self._columns = sorted({name for prompt in prompts for name in prompt.columns or {}})
        self._texts: dict[int, list[str]] = {}

    def __enter__(self) -> "Asking":
        """Itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Pass it on to the functions."""
        if self._scoring is not None:
            self._scoring.__exit__(*error)

    def add(self, prompt: int, group: Rollout) -> None:
        """The samples of one prompt, given by its place."""
        ids = [group.completion_ids(n) for n in range(self._samples)]
        self._texts[prompt] = self._decoded(ids)
        if self._scoring is not None:
            batch = self._batch(self._prompts[prompt : prompt + 1], ids, self._texts[prompt])
            self._scoring.add(prompt * self._samples, batch)

    def finish(self, rollout: Rollout) -> Answers:
        """What the functions say of all rows; those of the groups that were added are the same."""
        ids = [rollout.completion_ids(n) for n in range(rollout.tokens.shape[0])]
        known = [self._texts[q] for q in sorted(self._texts)]
        texts = [text for group in known for text in group] if known else self._decoded(ids)
        if self._scoring is None:
            nothing = np.zeros((len(self._scorer.config.reward.functions), len(ids)), np.float32)
            return Answers(texts, from_first(nothing))
        scores = self._scoring.finish(self._batch(self._prompts, ids, texts))
        by_function = from_first(scores.rewards.astype(np.float32))
        return Answers(texts, by_function, scores.warnings, scores.extra, scores.metrics)

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        return [decode(self._scorer.tokenizer, row, self._scorer.stop_ids) for row in ids]

    def _batch(self, prompts: list[Prompt], ids: list[list[int]], texts: list[str]) -> Batch:
        repeated = [prompt for prompt in prompts for _ in range(self._samples)]
        columns = {name: [(prompt.columns or {}).get(name) for prompt in repeated] for name in self._columns}
        said: list[Any] = [
            text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(repeated, texts, strict=True)
        ]
        return Batch([prompt.text for prompt in repeated], said, ids, columns, self._state)


@jax.jit
def _spread(rewards: jax.Array, weights: jax.Array) -> jax.Array:
    """Rewards [F, Q, G] with NaN for no answer -> [Q], which groups have weighted rewards that differ."""
    return algo.has_spread(*algo.combine_rewards(rewards, weights, valid=jnp.isfinite(rewards)))


@partial(jax.jit, static_argnums=(0, 1))
def _judge(
    config: AlgorithmConfig,
    limit: int,
    rewards: jax.Array,
    weights: jax.Array,
    lengths: jax.Array,
    counted: jax.Array,
    greedy: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Rewards [F, Q, G] with NaN for no answer -> reward, scored, spread, advantages, greedy reward [Q]."""
    reward, scored = algo.combine_rewards(rewards, weights, valid=jnp.isfinite(rewards))
    spread = algo.has_spread(reward, scored)
    reward = algo.clip_symmetric(reward, config.reward_clip)
    if config.soft_overlong:
        reward = reward + algo.soft_overlong(lengths, limit, buffer_len=config.overlong_buffer_len)
    reward = jnp.where(scored, reward, 0.0)
    if greedy is not None:
        baseline, answered = algo.combine_rewards(greedy[:, :, None], weights)
        baseline = algo.clip_symmetric(baseline, config.reward_clip)
        greedy = jnp.where(answered, baseline, jnp.nan)[:, 0]
    if config.waits_for_learner:
        return reward, scored, spread, jnp.zeros_like(reward), greedy
    valid = scored & counted[:, None]
    if config.advantage == "gdpo":
        rewards = jnp.where(valid, rewards, jnp.nan)
        return reward, scored, spread, estimate(config, rewards, None, lengths, greedy, weights), greedy
    return reward, scored, spread, estimate(config, reward, valid, lengths, greedy), greedy


def estimate(
    config: AlgorithmConfig,
    rewards: jax.Array,
    valid: jax.Array | None,
    lengths: jax.Array,
    greedy: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Advantages [Q, G] by the config's estimator over groups (docs/MATH.md, section 1).

    Args:
        config: the algorithm; its advantage is not gae.
        rewards: [Q, G]; for gdpo [F, Q, G], NaN for no answer.
        valid: [Q, G] bool, samples that count; None: all answers.
        lengths: [Q, G] completion tokens.
        greedy: [Q], for remax.
        weights: [F], for gdpo.
    """
    own = ":" in config.advantage
    advantages = algo.group_advantages(
        rewards,
        estimator=load_function(config.advantage) if own else cast(Estimator, config.advantage),
        valid=valid,
        lengths=lengths,
        greedy=greedy,
        k=config.pass_k,
        weights="tokens" if config.weight == "tokens" else weights,
        ddof=config.ddof,
        eps=config.eps,
    )
    return algo.clip_symmetric(advantages, config.advantage_clip)
