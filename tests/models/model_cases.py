"""What the tests about models share: tiny configs, random tensors in Hugging Face's names, and comparison."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.models import Model, ModelSpec
from grpo_jax.models.tensors import list_tensors

HIDDEN, PREFILL, DECODE = (jax.jit(f, static_argnums=0) for f in (Model.hidden, Model.prefill, Model.decode))
"""Jitted with the model static, so that tests of equal shapes share a compile."""

GOLDEN = Path(__file__).parent / "golden.npz"

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


WINDOW = {"sliding_window": 4, "head_dim": 6}
FAMILY_CASES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 6},
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 11,
        **WINDOW,
    },
    "gemma3": {"model_type": "gemma3_text", "rope_parameters": None, "sliding_window_pattern": 2, **WINDOW},
    "phi3": {
        "model_type": "phi3",
        "num_key_value_heads": 1,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 2.5,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 3.0,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}
"""A row for each way through the model that qwen2 and llama do not take."""


def config(model_type: str = "qwen2", **fields: Any) -> dict[str, Any]:
    """A config.json in the newer spelling."""
    base = {
        "model_type": model_type,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "dtype": "float32",
    }
    return base | fields


def random_model(seed: int = 0, model: dict[str, Any] | None = None, **fields: Any) -> tuple[Model, Any]:
    """A model and parameters with every norm scale and bias drawn at random, no two alike."""
    built = Model(ModelSpec.from_hf(config(**fields)), **(model or {}))
    leaves, tree = jax.tree.flatten(built.init(seed))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        value = np.asarray(leaf, np.float32) + 0.3 * rng.standard_normal(leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return built, jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


def random_tokens(shape: tuple[int, ...], vocab: int = 61, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def by_hf_name(model: Model, params: Any) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, as Hugging Face's tensors."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return {
        tensor.name: np.concatenate([leaves[leaf][entry.index].reshape(entry.shape) for leaf, entry in tensor.parts])
        for tensor in list_tensors(model)
    }


def whole_rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions and segment ids of rows without padding."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones(tokens.shape, np.int32)


def mean_logp(model: Model, params: Any, tokens: np.ndarray) -> jax.Array:
    """Mean log-probability of ``tokens[:, 1:]``."""
    logp = jax.nn.log_softmax(model.logits(params, tokens)[:, :-1])
    return jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


def relative(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def check_gradients(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Every gradient that is wanted, to 2e-5 of the largest."""
    scale = max(np.abs(want).max() for want in wanted.values())
    for name, want in wanted.items():
        assert np.abs(got[name] - want).max() < 2e-5 * scale, name


VALUE_AND_GRADIENT = jax.jit(jax.value_and_grad(mean_logp, argnums=1), static_argnums=0)
