"""curves.png in the run's directory."""

from pathlib import Path
from typing import Any

from grpo_jax import rundir
from grpo_jax.callbacks import Callback, Run
from grpo_jax.metrics import read_json_lines

PANELS = (
    ("reward, mean of the step", ("reward",)),
    ("held-out accuracy", ("eval/accuracy", "eval/avg_at_k", "eval/pass_at_k")),
    ("entropy (nat)", ("entropy",)),
    ("completion length (tokens)", ("completions/mean_length",)),
)
"""Title and metrics of each part of the picture."""


class Curves(Callback):
    """Draws the run's curves when it is over, also one that was interrupted."""

    def __init__(self) -> None:
        """Nothing to draw yet."""
        self._directory: Path | None = None

    def on_start(self, run: Run) -> None:
        """Remember where."""
        self._directory = run.directory

    def close(self) -> None:
        """Draw."""
        if self._directory is not None:
            draw_curves(read_json_lines(self._directory / rundir.METRICS), self._directory / "curves.png")


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward, held-out accuracy, entropy and length against the step into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)  # and not pyplot, whose windows and settings are the user's
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)
