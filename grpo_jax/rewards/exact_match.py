"""Reward 1 for the right final answer."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, final_answer, normalise


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's final answer is the one in the dataset's ``answer`` column, else 0.0.

    Both are read by the same rule (``answers.marked_answer``: in the last ``<answer>`` tags, else after the last
    ``####``, else inside the last ``\boxed{}``, else after the last ``=`` or ``Answer:``, else the whole stripped
    text), so the column may hold
    ``18`` or a GSM8K working that ends in ``#### 18``; both are normalised (``answers.normalise``). An empty
    answer is never right; a row whose ``answer`` is None gets None.

    >>> exact_match(["3+4", "3+4", "?"], ["3+4 = 7", "I think 8", "7"], [[], [], []], answer=["7", 7.0, None])
    [1.0, 0.0, None]
    """
    return [
        None if wanted is None else _score(completion_text(completion), str(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def _score(text: str, wanted: str) -> float:
    got = normalise(final_answer(text))
    return 1.0 if got and got == normalise(final_answer(wanted)) else 0.0
