"""The algorithm core: pure functions on arrays, jax and chex only. docs/MATH.md is its specification, row by row.

Names are imported on first use, so that `import grpo_jax.algo.spec` needs the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.algo import logprobs as logprobs
    from grpo_jax.algo.advantages import ADVANTAGES as ADVANTAGES
    from grpo_jax.algo.advantages import Options as Options
    from grpo_jax.algo.advantages import group_advantages as group_advantages
    from grpo_jax.algo.advantages import has_spread as has_spread
    from grpo_jax.algo.advantages import whiten as whiten
    from grpo_jax.algo.aggregate import AGGREGATIONS as AGGREGATIONS
    from grpo_jax.algo.controllers import EntropyController as EntropyController
    from grpo_jax.algo.controllers import adaptive_entropy as adaptive_entropy
    from grpo_jax.algo.controllers import adaptive_kl as adaptive_kl
    from grpo_jax.algo.controllers import follow_reference as follow_reference
    from grpo_jax.algo.critic import gae as gae
    from grpo_jax.algo.critic import value_loss as value_loss
    from grpo_jax.algo.kl import KL_ESTIMATORS as KL_ESTIMATORS
    from grpo_jax.algo.logprobs import logprobs_and_entropy as logprobs_and_entropy
    from grpo_jax.algo.losses import SURROGATES as SURROGATES
    from grpo_jax.algo.losses import Inputs as Inputs
    from grpo_jax.algo.policy import policy_loss as policy_loss
    from grpo_jax.algo.ratios import CORRECTIONS as CORRECTIONS
    from grpo_jax.algo.shaping import clip_symmetric as clip_symmetric
    from grpo_jax.algo.shaping import combine_rewards as combine_rewards
    from grpo_jax.algo.shaping import kl_in_reward as kl_in_reward
    from grpo_jax.algo.shaping import overlong_filter as overlong_filter
    from grpo_jax.algo.shaping import soft_overlong as soft_overlong
    from grpo_jax.algo.spec import PRESETS as PRESETS
    from grpo_jax.algo.spec import LossConfig as LossConfig
    from grpo_jax.algo.spec import Recipe as Recipe
    from grpo_jax.algo.statistics import Choice as Choice
    from grpo_jax.algo.statistics import Denominators as Denominators
    from grpo_jax.algo.statistics import choose as choose
    from grpo_jax.algo.statistics import denominators as denominators

_HOMES: dict[str, tuple[str, ...]] = {
    "advantages": ("ADVANTAGES", "Options", "group_advantages", "has_spread", "whiten"),
    "aggregate": ("AGGREGATIONS",),
    "controllers": ("EntropyController", "adaptive_entropy", "adaptive_kl", "follow_reference"),
    "critic": ("gae", "value_loss"),
    "kl": ("KL_ESTIMATORS",),
    "losses": ("SURROGATES", "Inputs"),
    "logprobs": ("logprobs_and_entropy",),
    "policy": ("policy_loss",),
    "ratios": ("CORRECTIONS",),
    "shaping": ("clip_symmetric", "combine_rewards", "kl_in_reward", "overlong_filter", "soft_overlong"),
    "statistics": ("Choice", "Denominators", "choose", "denominators"),
    "spec": ("PRESETS", "LossConfig", "Recipe"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "logprobs"])


def __getattr__(name: str) -> Any:
    if name == "logprobs":
        return importlib.import_module("grpo_jax.algo.logprobs")
    if name in _HOME:
        return getattr(importlib.import_module(f"grpo_jax.algo.{_HOME[name]}"), name)
    raise AttributeError(f"module 'grpo_jax.algo' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
