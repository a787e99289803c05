"""Early stopping: the run ends when its evaluations no longer improve, or are good enough."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from grpo_jax.callbacks import Callback, Evaluation, Run
from grpo_jax.config import StopConfig


class EarlyStopping(Callback):
    """Ends a run by ``eval.stop``; a resumed run knows from its own record what it knew before."""

    def __init__(self, config: StopConfig):
        """Args: when to stop."""
        self._config = config
        self._best: float | None = None
        self._without = 0

    def on_start(self, run: Run) -> bool:
        """Go through the evaluations so far; True where the run had already ended by them."""
        return any([self._judge(row) for row in run.history if self._config.metric in row])

    def on_eval(self, evaluation: Evaluation) -> bool:
        """Whether the run ends here.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if self._config.metric not in evaluation.metrics:
            names = [name for name in evaluation.metrics if name.startswith("eval/")]
            near = difflib.get_close_matches(self._config.metric, names, 1)
            raise ValueError(
                f"eval.stop.metric: got {self._config.metric!r}, which no evaluation has; "
                + (f"did you mean {near[0]}? It has " if near else "it has ")
                + ", ".join(names)
            )
        return self._judge(evaluation.metrics)

    def _judge(self, row: Mapping[str, Any]) -> bool:
        config, value = self._config, row[self._config.metric]
        value = None if value is None or math.isnan(value) else value  # nothing was scored
        if value is not None and (self._best is None or value > self._best + config.min_delta):
            self._best, self._without = float(value), 0
        else:
            self._without += 1
        enough = config.at_least is not None and value is not None and value >= config.at_least
        return enough or (config.patience is not None and self._without >= config.patience)
