"""Tiny configs of transformers' own config classes, a row each, and the random tensors of their models.

Plain data and NumPy alone: scripts/make_hf_golden.py reads it too, and knows nothing of grpo_jax.
"""

import zlib
from typing import Any

import numpy as np

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LENGTH = 40
"""Tokens of a row: more than every window and every original context length here."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 1.7, 2.9, 4.2],
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_TYPES = [SLIDING, SLIDING, FULL, SLIDING]

Case = tuple[str, dict[str, Any]]

CASES: dict[str, Case] = {
    "qwen2 grouped, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 one key head, untied": ("Qwen2Config", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen2 head_dim apart, yarn": (
        "Qwen2Config",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "rope_parameters": YARN},
    ),
    "qwen2 window not in use": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "qwen2 windows by layer types": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "llama grouped, untied": ("LlamaConfig", {"rms_norm_eps": 1e-5}),
    "llama 3 rotary, tied": (
        "LlamaConfig",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama biases, head_dim apart": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "llama theta, exact gelu": (
        "LlamaConfig",
        {"hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 97.0}},
    ),
    "llama linear rotary": (
        "LlamaConfig",
        {"hidden_act": "relu", "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "llama dynamic rotary, short text": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "llama dynamic rotary, long text": (
        "LlamaConfig",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0},
        },
    ),
    "llama yarn with mscale": (
        "LlamaConfig",
        {
            "rope_parameters": YARN
            | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
        },
    ),
    "llama yarn with its factor": ("LlamaConfig", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen3 head_dim apart, biases": ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
    "qwen3 windows, one key head, tied": (
        "Qwen3Config",
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "mistral window": ("MistralConfig", {"sliding_window": 9, "tie_word_embeddings": True}),
    "mistral no window, head_dim apart": ("MistralConfig", {"sliding_window": None, "head_dim": 6}),
    "gemma one key head": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 10}),
    "gemma biases, untied": (
        "GemmaConfig",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "gemma2 windows, caps": (
        "Gemma2Config",
        {
            "head_dim": 10,
            "sliding_window": 6,
            "query_pre_attn_scalar": 23,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2 no caps, biases": (
        "Gemma2Config",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "layer_types": GEMMA_TYPES,
            "sliding_window": 11,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3 pattern of six, eight layers": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 8, "head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 17},
    ),
    "gemma3 two rotaries, cap": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "layer_types": GEMMA_TYPES,
            "sliding_window": 7,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 700.0, "factor": 4.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3 partial rotary, window": (
        "Phi3Config",
        {
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3 one key head, longrope, short text": (
        "Phi3Config",
        {"num_key_value_heads": 1, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "phi3 partial longrope, long text": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "rope_parameters": LONGROPE
            | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.5, 4.0]},
        },
    ),
    "olmo2 grouped": ("Olmo2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "olmo2 all heads, biases, tied": (
        "Olmo2Config",
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "granite multipliers": (
        "GraniteConfig",
        {
            "embedding_multiplier": 2.5,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.11,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite biases": ("GraniteConfig", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3}),
    "smollm3 every other layer without rotary": (
        "SmolLM3Config",
        {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "attention_bias": True},
    ),
    "smollm3 windows without rotary, untied": (
        "SmolLM3Config",
        {
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9, "intermediate_size": 24},
    ),
    "qwen3_moe one dense layer, normalised": (
        "Qwen3MoeConfig",
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_moe every other layer, tied": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}

LONGEST = {name: LENGTH for name in CASES if name.endswith("long text")}
"""Cases whose rotary must be told how long the texts are."""

GRADIENTS = ("llama biases, head_dim apart", "gemma2 windows, caps", "phi3 partial rotary, window", "mixtral")
"""Cases whose gradients are compared too."""


def fields(case: str) -> dict[str, Any]:
    """What the case's config class is given."""
    return SHAPE | CASES[case][1]


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor: float32, norms' scales around 1, no two tensors alike, the same for ever."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    return (noise + ("norm" in name)).astype(np.float32)


def draw_tokens() -> np.ndarray:
    """[2, LENGTH] int32."""
    return np.random.RandomState(7).randint(0, SHAPE["vocab_size"], (2, LENGTH)).astype(np.int32)
