"""Reward 1 for the right answer in a box."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, last_box, readings, reference_text
from grpo_jax.rewards.equality import any_same


def boxed(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the last ``\boxed{...}`` of the completion holds the ``answer`` column's answer, else 0.0.

    The answer column may hold the answer or a solution that ends in a box of its own. Both are compared as text, by
    ``equality.same``: for 0.5 and ``\frac{1}{2}`` to be the same, use ``math_verify``. A box that never closes is no
    box, an empty answer is never right, and a row whose ``answer`` is missing gets None.

    >>> said = [r"So \boxed{\frac{1}{2}}.", r"\boxed{1} or \boxed{\dfrac{1}{2}}", r"\frac{1}{2}"]
    >>> boxed(["2/4"] * 3, said, [[]] * 3, answer=[r"\frac{1}{2}"] * 3)
    [1.0, 1.0, 0.0]
    """
    return [
        None
        if wanted is None
        else float(any_same([last_box(completion_text(completion)) or ""], readings(wanted), True))
        for completion, wanted in zip(completions, map(reference_text, answer), strict=True)
    ]
