"""What scripts/make_greedy_golden.py asks transformers for, and the tests ask the engine for. Plain data."""

CASES = (
    "qwen2 windows by layer types",
    "llama 3 rotary, tied",
    "qwen3 windows, one key head, tied",
    "gemma2 windows, caps",
    "gemma3 two rotaries, cap",
    "gemma one key head",
    "mistral window",
    "phi3 partial rotary, window",
    "olmo2 grouped",
    "granite multipliers",
    "smollm3 windows without rotary, untied",
    "mixtral",
    "qwen3_moe one dense layer, normalised",
)
"""Of tests/models/hf_cases.py, one a family."""
PROMPTS = ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24])
NEW = 24
"""Tokens at most: beyond every window."""
STOP = 1
