"""What a run prints."""

import sys
from collections.abc import Mapping
from typing import Any

from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.config import TrainConfig
from grpo_jax.metrics import step_line


class Terminal(Callback):
    """Plain lines; with log.quiet only warnings and the result."""

    def __init__(self, config: TrainConfig):
        """Print for a run of this config."""
        self._config = config

    def on_start(self, run: Run) -> None:
        """The facts of the run."""
        self._directory = run.directory
        for fact in run.facts:
            self._say(fact)

    def on_step(self, step: Step) -> None:
        """A line of key figures."""
        self._say(step_line(self._config.steps, step.metrics))

    def on_eval(self, evaluation: Evaluation) -> None:
        """A line of figures on the held-out prompts."""
        k, row = self._config.eval.samples, evaluation.metrics
        names = {"eval/accuracy": "greedy", "eval/avg_at_k": f"avg@{k}", "eval/pass_at_k": f"pass@{k}"}
        shown = ", ".join(f"{n} {row[f]:.1%}" for f, n in names.items() if f in row)
        self._say(f"held-out after step {evaluation.step}: {shown}")

    def on_warning(self, text: str) -> None:
        """One line on the standard error."""
        print(f"warning: {text}", file=sys.stderr)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The result."""
        first, last, best = (summary[f"accuracy_{which}"] for which in ("first", "last", "best"))
        if first is not None:
            gain = f"held-out accuracy {first:.1%} -> {last:.1%}, best {best:.1%}"
            seconds = f"{summary['steps']} steps in {summary['seconds']:.0f} s"
            print(f"{gain}; {seconds}; everything is in {self._directory}")

    def _say(self, line: str) -> None:
        if not self._config.log.quiet:
            print(line, flush=True)
