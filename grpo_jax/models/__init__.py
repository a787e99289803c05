"""Models: the only folder that imports Flax. Everyone else holds a static ``Model`` and an opaque ``Params`` pytree."""

from grpo_jax.models.hf import load_model, save_hf
from grpo_jax.models.model import Cache, Model, PromptCache, View
from grpo_jax.models.spec import ModelSpec

__all__ = ["Cache", "Model", "ModelSpec", "PromptCache", "View", "load_model", "save_hf"]
