"""GRPO for language models as one JAX program."""
