"""What looks on while a run goes: the protocol, and what a callback is told. The first process alone calls them.

A callback changes nothing of the training; it may only end it, by returning True or by `Run.stop`. One that raises once
the run has started is warned of, and the run goes on. What the run itself writes (metrics.jsonl,
completions.jsonl) is written before any callback is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.config import TrainConfig
from grpo_jax.scoring import Scored
from grpo_jax.types import Prompt, Rollout


@dataclass
class Course:
    """How far a run is.

    Attributes:
        step: that is being made, or was last; 0 before the first.
        stop: whether `Run.stop` was called.
    """

    step: int = 0
    stop: bool = False


@dataclass(frozen=True)
class Run:
    """What is known before the first step.

    Attributes:
        config: of the run.
        directory: where it writes.
        tokenizer: of the model.
        reward_names: the F reward functions, in the order of ``Scored.by_function``.
        start: the step it goes on from; 0 for a new run.
        facts: lines worth telling: device, memory, shapes, prompts left out.
        history: rows of metrics.jsonl up to ``start``, those of evaluations among them; empty for a new run.
        states: what `Callback.state` gave at ``start``, by the name of the class.
        most_new_tokens: completions may have by the model's positions; None where that is not known.
        course: how far it is, which moves on.
    """

    config: TrainConfig
    directory: Path
    tokenizer: Any
    reward_names: tuple[str, ...]
    start: int = 0
    facts: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    states: Mapping[str, Any] = field(default_factory=dict)
    most_new_tokens: int | None = None
    course: Course = field(default_factory=Course, compare=False)

    def __post_init__(self) -> None:
        """The course begins where the run does."""
        self.course.step = self.course.step or self.start

    def stop(self) -> None:
        """End the run after the step at hand, as if it had been the last; from any thread."""
        self.course.stop = True


@dataclass(frozen=True)
class Step:
    """One rollout, trained on.

    Attributes:
        step: rollouts trained on so far, this one among them; the first is 1.
        metrics: the row of metrics.jsonl.
        prompts: Q prompts.
        rollout: N = Q * G rows.
        scored: rewards, advantages and text of the N completions.
    """

    step: int
    metrics: Mapping[str, Any]
    prompts: list[Prompt]
    rollout: Rollout
    scored: Scored


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of every held-out set.

    Attributes:
        step: rollouts trained on before it; 0 comes before the first.
        metrics: the row of metrics.jsonl: "eval/accuracy" of the first set, "eval/<name>/accuracy" of each where
            there are several, likewise avg_at_k and pass_at_k.
    """

    step: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Callback:
    """Looks on; every method may be left out. What is returned but True, and what is raised, ends nothing."""

    def on_start(self, run: Run) -> bool | None:
        """Before the first evaluation; True where the run had already ended by what it recorded."""

    def on_step(self, step: Step) -> bool | None:
        """After a step; True ends the run after it, as if it had been the last."""

    def on_eval(self, evaluation: Evaluation) -> bool | None:
        """After an evaluation; True ends the run."""

    def on_warning(self, text: str) -> None:
        """The run has something to warn of, such as a reward function that failed."""

    def state(self) -> Any:
        """What it must know to go on from here, JSON values only; a checkpoint keeps it. None: nothing."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """After the export, with what summary.json holds."""

    def close(self) -> None:
        """Always called last, after an error or an interruption too, in the reverse order."""
