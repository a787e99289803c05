"""The reward of the task that the package ships."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, reference_text


def quickstart(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion ends in ``: `` and the answer that the ``answer`` column holds, else 0.0.

    A row whose ``answer`` is missing gets None.

    >>> quickstart(["2+2="] * 3, ["2+2=4: 4", "2+2=5: 5", "4"], [[], [], []], answer=["4", "4", "4"])
    [1.0, 0.0, 0.0]
    """
    from grpo_jax.quickstart.task import parse  # the task's module is only paid for by those who use it

    return [
        None if right is None else float(parse(completion_text(text)) == right.strip())
        for text, right in zip(completions, map(reference_text, answer), strict=True)
    ]
