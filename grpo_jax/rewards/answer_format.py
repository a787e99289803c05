"""Reward 1 for an answer that can be found."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, marked_answer


def answer_format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion marks a final answer, right or wrong, else 0.0.

    An answer is marked by ``####``, ``\boxed{}``, ``=`` or ``Answer:`` with something behind or inside it
    (``answers.marked_answer``).

    >>> answer_format(["3+4"] * 3, ["3+4 = 9", "seven", "Answer:"], [[], [], []])
    [1.0, 0.0, 0.0]
    """
    return [0.0 if marked_answer(completion_text(completion)) is None else 1.0 for completion in completions]
