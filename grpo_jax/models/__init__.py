"""Models: the only folder that imports Flax. Everyone else holds a static ``Model`` and an opaque ``Params`` pytree."""

from grpo_jax.models.hf import load_model, read_model, save_hf
from grpo_jax.models.model import Cache, Model, PromptCache, View
from grpo_jax.models.moe import balance_loss, router_metrics
from grpo_jax.models.peft import save_peft
from grpo_jax.models.spec import LoraSpec, ModelSpec
from grpo_jax.models.transformer import Routed

__all__ = [
    "Cache",
    "LoraSpec",
    "Model",
    "ModelSpec",
    "PromptCache",
    "Routed",
    "View",
    "balance_loss",
    "load_model",
    "read_model",
    "router_metrics",
    "save_hf",
    "save_peft",
]
