"""report.html in the run's directory: the run's curves and completions as one page that opens from disk.

Made from the run's files alone, so that it can be made again for any run: `write_report`, or
``python -m grpo_jax.callbacks.report RUN``. It is rewritten while the run goes on, whole or not at all, and so seldom
that it costs less than a hundredth of the time.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax import rundir
from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.callbacks.report.completions import Completions
from grpo_jax.callbacks.report.page import describe, write_page
from grpo_jax.metrics import JsonLines

SHARE = 0.01
"""Of the run's time, at most so much goes into the report."""
SHORTEST = 5.0
"""Seconds between two versions at least."""


def write_report(directory: str | Path) -> Path:
    """Write report.html for a run, finished or not; where it lies.

    Raises:
        ValueError: no such directory, or no run in it.
    """
    directory = Path(directory)
    if not (directory / rundir.METRICS).is_file():
        raise ValueError(f"{directory} holds no {rundir.METRICS}, so there is nothing to show. Give a run's directory.")
    completions = Completions(directory / rundir.COMPLETIONS)
    completions.read()
    state = "finished" if (directory / rundir.SUMMARY).exists() else "not finished"
    return write_page(directory, describe(directory, state), completions)


class Report(Callback):
    """Keeps report.html up to date."""

    def __init__(self, directory: Path):
        """Args: the run's directory."""
        self._directory, self._completions = directory, Completions(directory / rundir.COMPLETIONS)
        self._due, self._state = 0.0, "running"
        self._started = False
        self._warnings: JsonLines | None = None
        self._early: list[str] = []

    def on_start(self, run: Run) -> None:
        """Go on with the warnings of the run's earlier part."""
        self._course, self._started = run.course, True
        if (self._directory / rundir.WARNINGS).exists():
            self._warnings = JsonLines(self._directory / rundir.WARNINGS, run.start + 1 if run.start else None)
        for text in self._early:
            self.on_warning(text)

    def on_step(self, step: Step) -> None:
        """Write when it is time."""
        self._write_when_due()

    def on_eval(self, evaluation: Evaluation) -> None:
        """Write when it is time."""
        self._write_when_due()

    def on_warning(self, text: str) -> None:
        """Keep it for the page."""
        if not self._started:
            self._early.append(text)
            return
        if self._warnings is None:
            self._warnings = JsonLines(self._directory / rundir.WARNINGS)
        self._warnings.write({"step": self._course.step, "text": text})

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The last version."""
        self._state = "finished"
        self._write()

    def close(self) -> None:
        """The last version of a run that did not come to its end, too."""
        if self._warnings is not None:
            self._warnings.close()
        if self._started and self._state == "running":
            self._state = "stopped"
            self._write()

    def _write_when_due(self) -> None:
        if time.monotonic() >= self._due:
            begun = time.monotonic()
            self._write()
            now = time.monotonic()
            self._due = now + max(SHORTEST, (now - begun) / SHARE)

    def _write(self) -> None:
        self._completions.read()
        write_page(self._directory, describe(self._directory, self._state), self._completions)
