"""GRPO for language models as one JAX program: the model that samples is the model that trains.

The names below load their modules when they are first used, so that importing this package costs nothing and a
reward's process never loads jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax import algo
    from grpo_jax.config import TrainConfig
    from grpo_jax.models import Model, load_model, save_hf
    from grpo_jax.rollout import generate
    from grpo_jax.trainer import Trainer

__all__ = ["Model", "TrainConfig", "Trainer", "algo", "generate", "load_model", "save_hf"]

_HOME = {
    "Model": "grpo_jax.models",
    "TrainConfig": "grpo_jax.config",
    "Trainer": "grpo_jax.trainer",
    "generate": "grpo_jax.rollout",
    "load_model": "grpo_jax.models",
    "save_hf": "grpo_jax.models",
}


def __getattr__(name: str) -> Any:
    if name == "algo":
        return importlib.import_module("grpo_jax.algo")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
