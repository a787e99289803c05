"""Every figure of a run for TensorBoard."""

from pathlib import Path
from typing import Any

from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.metrics import scalars

FOLDER = "tensorboard"


class TensorBoard(Callback):
    """Writes event files into tensorboard/ of the run's directory."""

    def __init__(self, directory: Path):
        """Args: the run's directory.

        Raises:
            ValueError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "log.tensorboard: got true, but tensorboardX is not installed; pip install 'grpo_jax[tensorboard]'"
            ) from error
        self._make, self._directory, self._writer = SummaryWriter, directory, None

    def on_start(self, run: Run) -> None:
        """Open the file; what lies behind the step a run goes on from no longer counts."""
        place = str(self._directory / FOLDER)
        self._writer = self._make(place, purge_step=run.start + 1 if run.start else None, flush_secs=10)

    def on_step(self, step: Step) -> None:
        """Write its figures."""
        self._write(step.metrics, step.step)

    def on_eval(self, evaluation: Evaluation) -> None:
        """Write its figures."""
        self._write(evaluation.metrics, evaluation.step)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, row: Any, step: int) -> None:
        assert self._writer is not None  # on_start comes first
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, step)
