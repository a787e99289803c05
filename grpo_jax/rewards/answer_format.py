"""Reward 1 for reasoning and answer in their tags."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, thought_and_rest


def answer_format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    opened: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the whole completion is ``<think>...</think> <answer>...</answer>``, else 0.0.

    Each tag stands there once, neither part is empty, and there is only white space around them
    (DeepSeek-R1-Zero's form, arXiv 2501.12948, table 1).

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        opened: the prompt ends with ``<think>`` already (some chat templates write it), so the completion must not.
        **columns: not looked at.

    >>> said = ["<think>3+4</think> <answer>7</answer>", "<think>3+4</think> 7", "<answer>7</answer>"]
    >>> answer_format(["3+4"] * 3, said, [[]] * 3)
    [1.0, 0.0, 0.0]
    """
    return [1.0 if _fits(completion_text(completion), opened) else 0.0 for completion in completions]


def _fits(text: str, opened: bool) -> bool:
    parts = thought_and_rest(text, opened)
    if parts is None or not parts[0] or "<answer>" in parts[0]:
        return False
    opening, answer, closing = parts[1][:8], parts[1][8:-9], parts[1][-9:]
    tags = (opening, closing) == ("<answer>", "</answer>") and "<answer>" not in answer and "</answer>" not in answer
    return tags and bool(answer.strip())
