"""What a step trains on: prompts sampled and scored, round after round where groups without spread are dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptStream
from grpo_jax.metrics import Phases
from grpo_jax.rewards import TrainerState
from grpo_jax.rollout import Engine, Sampling
from grpo_jax.scoring import Answers, Scored, Scorer
from grpo_jax.types import Params, Prompt, Rollout

COUNTS = ("rounds", "groups_sampled", "groups_without_spread", "groups_left_over", "steps_not_full")
"""What dynamic sampling counts in each step and over the run."""


@dataclass(frozen=True)
class Collected:
    """The batch of one step, of one shape whatever was dropped.

    Attributes:
        prompts: Q prompts; those not in ``scored.counted`` only fill the shape.
        rollout: N = Q * G rows.
        scored: their rewards and advantages.
        metrics: what dynamic sampling did, by metric name; empty without it.
        warnings: what to tell the user.
    """

    prompts: list[Prompt]
    rollout: Rollout
    scored: Scored
    metrics: Mapping[str, float]
    warnings: tuple[str, ...]


class Collector:
    """Samples and scores until a step's batch is full (docs/MATH.md, section 6).

    Under dynamic sampling a group is kept when its rewards differ. Rounds of Q prompts go on until Q groups are kept
    or ``algorithm.max_rounds`` are spent. The first Q kept in prompt order are trained on; the completions of the
    others are dropped, and their prompts, which are neither too easy nor too hard, are drawn first by the next step.
    """

    def __init__(
        self,
        prompts: PromptStream,
        engine: Engine,
        scorer: Scorer,
        sampling: Sampling,
        config: TrainConfig,
        phases: Phases,
    ):
        """Args: the parts that draw, sample and judge; the run's config; where seconds are counted."""
        self._prompts, self._engine, self._scorer, self._sampling = prompts, engine, scorer, sampling
        self._config, self._phases = config, phases
        self._left_over: list[Prompt] = []
        self._counts = dict.fromkeys(COUNTS, 0)

    def next(self, params: Params, step: int) -> Collected:
        """The batch of a step, sampled from ``params`` or the engine's view of them; ``step`` addresses its uniforms.

        Raises:
            ValueError: the model's log-probabilities are not finite, or a reward is beyond float32.
        """
        if not self._config.algorithm.dynamic_sampling:
            prompts, rollout, answers = self._round(params, step)
            greedy = self._greedy(params, prompts, step)
            with self._phases("reward"):
                scored = self._scorer.judge(rollout, answers, np.ones(len(prompts), bool), greedy)
            return Collected(prompts, rollout, scored, {}, answers.warnings)
        rounds: list[tuple[list[Prompt], Rollout, Answers]] = []
        spread: list[bool] = []
        wanted = self._config.rollout.prompts_per_step
        while len(rounds) < self._config.algorithm.max_rounds and sum(spread) < wanted:
            rounds.append(self._round(params, step))
            spread += self._scorer.spread(rounds[-1][2], wanted).tolist()
        return self._select(rounds, np.asarray(spread), params, step)

    def state(self) -> dict[str, Any]:
        """Where it stands, JSON values only: prompts drawn, request ids left over, and counts of the run."""
        left_over = [prompt.request_id for prompt in self._left_over]
        return {"cursor": self._prompts.state(), "left_over": left_over, "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._prompts.restore(state["cursor"])
        self._left_over = [self._prompts.by_request(i) for i in state["left_over"]]
        self._counts |= state["counts"]

    def progress(self, step: int) -> TrainerState:
        """How far the run is at a step, for the reward functions that look at it."""
        epoch = self._prompts.state() / len(self._prompts)
        return TrainerState(step, self._config.steps, epoch, self._config.rollout.max_new_tokens)

    def _round(self, params: Params, step: int) -> tuple[list[Prompt], Rollout, Answers]:
        config = self._config
        with self._phases("data"):
            wanted = config.rollout.prompts_per_step
            again, self._left_over = self._left_over[:wanted], self._left_over[wanted:]
            prompts = again + self._prompts.next(wanted - len(again))
        return prompts, *self._sampled(params, prompts, config.rollout.num_samples, self._sampling, step)

    def _sampled(
        self, params: Params, prompts: list[Prompt], samples: int, sampling: Sampling, step: int
    ) -> tuple[Rollout, Answers]:
        """Completions, and what the reward functions say: a group goes to them when it is done, others decode on."""
        groups: dict[int, Rollout] = {}
        with self._scorer.begin(prompts, samples, self.progress(step)) as asking:
            with self._phases("rollout"):
                stream = iter(
                    self._engine.stream(
                        params, prompts, num_samples=samples, sampling=sampling, seed=self._config.seed, step=step
                    )
                )
            while True:
                with self._phases("rollout"):
                    group = next(stream, None)
                if group is None:
                    break
                _check_finite(group.rollout, step)
                groups[group.prompt] = group.rollout
                with self._phases("reward"):
                    asking.add(group.prompt, group.rollout)
            rollout = Rollout.join([groups[place] for place in range(len(prompts))])
            with self._phases("reward"):
                return rollout, asking.finish(rollout)

    def _greedy(self, params: Params, prompts: list[Prompt], step: int) -> np.ndarray | None:
        """[F, Q] rewards of one greedy completion per prompt, the baseline of remax; None for other estimators."""
        if self._config.algorithm.advantage != "remax":
            return None
        sampling = replace(self._sampling, temperature=0.0, top_k=None, top_p=None)
        return self._sampled(params, prompts, 1, sampling, step)[1].by_function

    def _select(
        self, rounds: list[tuple[list[Prompt], Rollout, Answers]], spread: np.ndarray, params: Params, step: int
    ) -> Collected:
        """The first Q groups with spread, filled up with others that train nothing."""
        wanted, samples = self._config.rollout.prompts_per_step, self._config.rollout.num_samples
        prompts = [prompt for some, _, _ in rounds for prompt in some]
        kept, dropped = np.flatnonzero(spread), np.flatnonzero(~spread)
        chosen = np.concatenate([kept, dropped])[:wanted]
        counted = np.arange(wanted) < len(kept)
        rows = (chosen[:, None] * samples + np.arange(samples)).reshape(-1)
        rollout = Rollout.join([rollout for _, rollout, _ in rounds]).take(rows)
        answers = Answers.join([answers for _, _, answers in rounds]).take(rows)
        greedy = self._greedy(params, [prompts[i] for i in chosen], step)
        with self._phases("reward"):
            scored = self._scorer.judge(rollout, answers, counted, greedy)
        self._left_over = [prompts[i] for i in kept[wanted:]] + self._left_over
        figures = {
            "rounds": len(rounds),
            "groups_sampled": len(spread),
            "groups_without_spread": len(dropped),
            "groups_left_over": max(len(kept) - wanted, 0),
            "steps_not_full": int(len(kept) < wanted),
        }
        self._counts = {name: self._counts[name] + count for name, count in figures.items()}
        warnings = answers.warnings
        if len(kept) < wanted:
            warnings += (
                f"dynamic sampling: after {len(rounds)} rounds {len(kept)} of {wanted} groups have rewards that "
                "differ, and the step trains on these. Raise algorithm.max_rounds or rollout.num_samples, or use "
                "prompts of another difficulty.",
            )
        metrics = {f"dynamic_sampling/{name}": float(count) for name, count in figures.items()}
        return Collected([prompts[i] for i in chosen], rollout, scored, metrics, warnings)


def _check_finite(rollout: Rollout, step: int) -> None:
    if not np.isfinite(rollout.sampler_logp).all():
        raise ValueError(
            f"after step {step} the model's log-probabilities are not finite, so what it samples means "
            "nothing. Lower optim.learning_rate; an earlier checkpoint may still be sound."
        )
