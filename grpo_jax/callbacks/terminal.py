"""What a run prints: a live display on a terminal, plain lines elsewhere, with log.quiet the result alone."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live

from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.callbacks.live import COMPILING, Screen, duration
from grpo_jax.config import TrainConfig
from grpo_jax.functions import printable
from grpo_jax.metrics import step_line

PER_SECOND = 2
"""How often the live display is drawn."""


class Terminal(Callback):
    """Tells whoever started the run how it goes; warnings always, on the standard error."""

    def __init__(self, config: TrainConfig, console: Console | None = None):
        """Print for a run of this config.

        Args:
            config: of the run.
            console: where to; None is the standard output.
        """
        self._config, self._console = config, console or Console()
        self._live: Live | None = None
        self._screen: Screen | None = None

    def on_start(self, run: Run) -> None:
        """The facts of the run; the live display begins below them."""
        self._directory = run.directory
        self._say(f"run directory: {run.directory}")
        for fact in run.facts:
            self._say(fact)
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._config.log.quiet:
            self._screen = Screen(self._config, run)
            # What others print meanwhile goes above the display; a standard error sent elsewhere stays there.
            self._live = Live(
                self._screen, console=self._console, refresh_per_second=PER_SECOND, redirect_stderr=sys.stderr.isatty()
            )
            self._live.start()
        else:
            self._say(COMPILING)

    def on_step(self, step: Step) -> None:
        """A line of key figures."""
        if self._screen is not None:
            self._screen.step(step)
        else:
            self._say(step_line(self._config.steps, step.metrics))

    def on_eval(self, evaluation: Evaluation) -> None:
        """A line of figures on the held-out prompts."""
        if self._screen is not None:
            self._screen.evaluation(evaluation)
        self._say(evaluation_line(evaluation, self._config.eval.samples))

    def on_warning(self, text: str) -> None:
        """One line on the standard error."""
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The result, in quiet runs too."""
        self.close()
        first, last, best = (summary[f"accuracy_{which}"] for which in ("first", "last", "best"))
        gain = "" if best is None else f"held-out accuracy {_share(first)} -> {_share(last)}, best {best:.1%}; "
        gain += _unscored(summary.get("unscored", {}))
        seconds = f"{summary['steps']} steps in {duration(summary['seconds'])}"
        self._print(f"{gain}{seconds}; everything is in {self._directory}")

    def close(self) -> None:
        """Leave the display as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, line: str) -> None:
        if not self._config.log.quiet:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def evaluation_line(evaluation: Evaluation, k: int) -> str:
    """An evaluation's figures in one line; ``k`` samples a prompt were drawn."""
    titles = {"accuracy": "greedy", "avg_at_k": f"avg@{k}", "pass_at_k": f"pass@{k}"}
    sets: dict[str, list[str]] = {}
    for name, value in evaluation.metrics.items():
        head, _, figure = name.rpartition("/")
        if figure in titles and head.startswith("eval"):
            sets.setdefault(head.removeprefix("eval").removeprefix("/"), []).append(f"{titles[figure]} {_share(value)}")
    named = {name: figures for name, figures in sets.items() if name} or sets
    shown = "; ".join(f"{name} {', '.join(figures)}".strip() for name, figures in named.items())
    unscored = evaluation.metrics.get("eval/unscored")
    return f"held-out after step {evaluation.step}: {shown}" + (f"; {unscored} not scored" if unscored else "")


def _share(value: float | None) -> str:
    return "none scored" if value is None or math.isnan(value) else f"{value:.1%}"


def _unscored(counts: Mapping[str, Any]) -> str:
    """How many completions of a run got no reward: by function in training, and in the last evaluation."""
    said = [f"{count} by {name!r}" for name, count in counts.get("training", {}).items() if count]
    said += [f"{counts['held_out']} of the last evaluation"] if counts.get("held_out") else []
    return f"not scored: {', '.join(said)}; " if said else ""
