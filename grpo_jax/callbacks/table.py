"""The callbacks of a run, from its config: one row each."""

from collections.abc import Callable
from pathlib import Path

from grpo_jax.callbacks import Callback
from grpo_jax.callbacks.curves import Curves
from grpo_jax.callbacks.terminal import Terminal
from grpo_jax.config import TrainConfig


def build(config: TrainConfig, directory: Path, warn: Callable[[str], None]) -> list[Callback]:
    """Those a config asks for, in the order in which they are called; ``warn`` tells all of them."""
    return [Terminal(config), Curves()]
