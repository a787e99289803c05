"""Evaluation of a run on its held-out prompts: greedy accuracy, and avg@k and pass@k over samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet
from grpo_jax.evaluation import avg_at_k, meaningless, pass_at_k, verdicts
from grpo_jax.rewards import TrainerState, reward_name
from grpo_jax.rollout import Engine, Sampling
from grpo_jax.scoring import Scorer
from grpo_jax.types import Params, Prompt

EVAL_ROUND = 2**32 - 1
"""The round that addresses the uniforms of every evaluation, so that two of them differ by the parameters only."""


@dataclass(frozen=True)
class Evaluator:
    """Judges parameters on every held-out set.

    Attributes:
        held_out: the sets by name; the first is the one that accuracy without a name speaks of.
        engine: what samples.
        scorer: what judges; the first reward function says what is correct.
        sampling: of the training; greedy but for the samples.
        config: of the run.
        warn: is told what goes wrong in the reward functions.
    """

    held_out: Mapping[str, PromptSet]
    engine: Engine
    scorer: Scorer
    sampling: Sampling
    config: TrainConfig
    warn: Callable[[str], None]

    def evaluate(self, params: Params, state: TrainerState | None = None) -> dict[str, float]:
        """Figures by name: "eval/accuracy" and the like; with several sets "eval/<set>/accuracy" of each as well.

        Args:
            params: to judge, or the engine's view of them.
            state: how far the run is, for the reward functions that look at it.
        """
        out: dict[str, float] = {}
        for name, prompts in self.held_out.items():
            figures = self._figures(params, prompts.prompts, state)
            if not out:
                out |= {f"eval/{figure}": value for figure, value in figures.items()}
            if len(self.held_out) > 1:
                out |= {f"eval/{name}/{figure}": value for figure, value in figures.items()}
        return out

    def _figures(self, params: Params, prompts: list[Prompt], state: TrainerState | None) -> dict[str, float]:
        greedy = replace(self.sampling, temperature=0.0, top_k=None, top_p=None)
        right, unscored = self._right(params, prompts, 1, greedy, state)
        out = {"accuracy": _mean(right)}
        k = self.config.eval.samples
        if k:
            right, more = self._right(params, prompts, k, self.sampling, state)
            counts, unscored = right.sum(1), unscored + more
            out["avg_at_k"] = _mean(avg_at_k(k, counts))
            out["pass_at_k"] = _mean(pass_at_k(k, counts, k))
        return out | {"unscored": unscored}

    def _right(
        self, params: Params, prompts: list[Prompt], samples: int, sampling: Sampling, state: TrainerState | None
    ) -> tuple[np.ndarray, int]:
        """[prompts with all samples scored, samples] bool, which are right; and how many samples were not scored."""
        seed = self.config.seed
        rollout = self.engine.generate(
            params, prompts, num_samples=samples, sampling=sampling, seed=seed, step=EVAL_ROUND
        )
        answers = self.scorer.rewards(prompts, rollout, state, only=(0,))
        rewards = answers.by_function[0].reshape(len(prompts), samples)
        judged, right = verdicts(rewards, self.config.eval.correct_above)
        for warning in (*answers.warnings, meaningless(judged, reward_name(self.config.reward.functions[0]))):
            if warning is not None:
                self.warn(warning)
        return right, int(np.isnan(rewards).sum())


def _mean(values: np.ndarray) -> float:
    """NaN of none."""
    return float(np.mean(values)) if values.size else float("nan")
