"""The callbacks of a run, from its config: one row each."""

from collections.abc import Callable
from pathlib import Path

from grpo_jax.callbacks import Callback
from grpo_jax.callbacks.curves import Curves
from grpo_jax.callbacks.early_stopping import EarlyStopping
from grpo_jax.callbacks.environment import Environment
from grpo_jax.callbacks.health import Health
from grpo_jax.callbacks.report import Report
from grpo_jax.callbacks.tensorboard import TensorBoard
from grpo_jax.callbacks.terminal import Terminal
from grpo_jax.callbacks.wandb import WandB
from grpo_jax.config import TrainConfig


def build(config: TrainConfig, directory: Path, warn: Callable[[str], None]) -> list[Callback]:
    """Those a config asks for, in the order in which they are called; ``warn`` tells all of them.

    Raises:
        ValueError: one needs a package that is not installed.
    """
    log = config.log
    rows: list[tuple[bool, Callable[[], Callback]]] = [
        (True, lambda: Environment(warn)),
        (True, lambda: Health(config, warn)),
        (True, lambda: EarlyStopping(config.eval.stop)),
        (True, Curves),
        (log.report, lambda: Report(directory)),
        (log.tensorboard, lambda: TensorBoard(directory)),
        (log.wandb is not None, lambda: WandB(str(log.wandb), directory)),
        (True, lambda: Terminal(config)),  # last, so that its last line comes when all is written
    ]
    made: list[Callback] = []
    try:
        for wanted, make in rows:
            if wanted:
                made.append(make())
    except BaseException:
        for callback in reversed(made):
            callback.close()
        raise
    return made
