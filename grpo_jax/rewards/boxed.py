"""Reward 1 for the right answer in a box."""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, final_answer, last_box, normalise_latex


def boxed(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the last ``\boxed{...}`` of the completion holds the ``answer`` column's answer, else 0.0.

    The answer column may hold the answer or a solution that ends in a box of its own. Both are compared as text,
    after ``answers.normalise_latex``: for 0.5 and ``\frac{1}{2}`` to be the same, use ``math_verify``. A box that never
    closes is no box, an empty answer is never right, and a row whose ``answer`` is None gets None.

    >>> said = [r"So \boxed{\frac{1}{2}}.", r"\boxed{1} or \boxed{\dfrac{1}{2}}", r"\frac{1}{2}"]
    >>> boxed(["2/4"] * 3, said, [[]] * 3, answer=[r"\frac{1}{2}"] * 3)
    [1.0, 1.0, 0.0]
    """
    return [
        None if wanted is None else _score(last_box(completion_text(completion)), str(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def _score(box: str | None, wanted: str) -> float:
    got = normalise_latex(box or "")
    return 1.0 if got and got == normalise_latex(final_answer(wanted)) else 0.0
