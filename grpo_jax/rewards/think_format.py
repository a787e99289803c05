"""Reward 1 for reasoning in its tags, then an answer."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, thought_and_rest


def think_format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    opened: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion is ``<think>...</think>`` and something behind it, each tag once, else 0.0.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        opened: the prompt ends with ``<think>`` already (some chat templates write it), so the completion must not.
        **columns: not looked at.

    >>> think_format(["3+4"] * 3, ["<think>3+4</think>7", "<think>3+4</think>", "<think>3+4, so 7"], [[]] * 3)
    [1.0, 0.0, 0.0]
    >>> think_format(["3+4 <think>"], ["3+4</think>7"], [[]], opened=True)
    [1.0]
    """
    parts = [thought_and_rest(completion_text(completion), opened) for completion in completions]
    return [1.0 if found is not None and all(found) else 0.0 for found in parts]
