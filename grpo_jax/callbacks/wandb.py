"""Every figure of a run for Weights & Biases."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.metrics import scalars


class WandB(Callback):
    """Logs to a project; WANDB_MODE and the other variables of wandb hold."""

    def __init__(self, project: str, directory: Path):
        """Args: the project, and the run's directory, which its name and id come from.

        Raises:
            ValueError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"log.wandb: got {project!r}, but wandb is not installed; pip install 'grpo_jax[wandb]'"
            ) from error
        self._wandb, self._project, self._directory = wandb, project, directory
        self._run: Any = None

    def on_start(self, run: Run) -> None:
        """Begin, or go on with the run of the same directory.

        Raises:
            ValueError: W&B refuses, for want of a login say.
        """
        place = self._directory.resolve()
        try:
            self._run = self._wandb.init(
                project=self._project,
                name=place.name,
                id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(place),
                config=run.config.model_dump(mode="json"),
                # It would catch what is printed, and print in between, to the harm of a live display.
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except self._wandb.Error as error:
            raise ValueError(f"log.wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline") from error
        # Rows carry their own step: evaluations follow the step that they are of, and a resumed run repeats some.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_step(self, step: Step) -> None:
        """Log its figures."""
        self._run.log({"step": step.step, **scalars(step.metrics)})

    def on_eval(self, evaluation: Evaluation) -> None:
        """Log its figures."""
        self._run.log({"step": evaluation.step, **scalars(evaluation.metrics)})

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Log what summary.json holds."""
        self._run.summary.update(dict(summary))

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._run is not None:
            self._run.finish()
