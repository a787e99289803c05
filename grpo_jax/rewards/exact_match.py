"""Reward 1 for the right final answer."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, readings, reference_text
from grpo_jax.rewards.equality import any_same


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's final answer is the one in the dataset's ``answer`` column, else 0.0.

    Both are read by the same rule (``answers.readings``: in the last ``<answer>`` tags, else inside the last
    ``\boxed{}``, else after the last ``####`` or ``Answer:``, else the whole text or what its last ``=`` says), so the
    column may hold ``18`` or a GSM8K working that ends in ``#### 18``. ``equality.same`` says what is the same. An
    empty answer is never right; a row whose ``answer`` is missing gets None.

    >>> exact_match(["3+4", "3+4", "?"], ["3+4 = 7", "I think 8", "7"], [[], [], []], answer=["7", 7.0, None])
    [1.0, 0.0, None]
    """
    return [
        None if wanted is None else float(any_same(readings(completion_text(completion)), readings(wanted)))
        for completion, wanted in zip(completions, map(reference_text, answer), strict=True)
    ]
