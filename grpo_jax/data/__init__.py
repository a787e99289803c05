"""Models and prompts from wherever they lie, and the order in which a run draws prompts. Host only; imports no jax.

A run calls ``resolve_model``, ``load_tokenizer``, ``stop_ids``, ``training_prompts`` and ``held_out_prompts``.
"""

from grpo_jax.data.chat import PromptFormat, decode, encode, load_tokenizer, read_template, stop_ids
from grpo_jax.data.places import resolve_model
from grpo_jax.data.prompt_set import PromptSet
from grpo_jax.data.prompts import PromptStream, held_out_prompts, training_prompts
from grpo_jax.data.sources import describe, load_dataset

__all__ = [
    "PromptFormat",
    "PromptSet",
    "PromptStream",
    "decode",
    "describe",
    "encode",
    "held_out_prompts",
    "load_dataset",
    "load_tokenizer",
    "read_template",
    "resolve_model",
    "stop_ids",
    "training_prompts",
]
