"""curves.png in the run's directory."""

from collections.abc import Mapping
from typing import Any

from grpo_jax import rundir
from grpo_jax.callbacks import Callback, Run
from grpo_jax.metrics import draw_curves, read_json_lines


class Curves(Callback):
    """Draws the run's curves at its end."""

    def on_start(self, run: Run) -> None:
        """Remember where."""
        self._directory = run.directory

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Draw."""
        draw_curves(read_json_lines(self._directory / rundir.METRICS), self._directory / "curves.png")
