"""A penalty on completions that repeat themselves."""

import math
from collections.abc import Sequence
from typing import Any


def repetition_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[float | None]:
    """``max_penalty`` times the share of the completion's n-grams of tokens that were there before.

    (1 - distinct n-grams / n-grams) * max_penalty, 0 for a completion shorter than one n-gram (arXiv 2502.03373,
    appendix C.2, as one figure of the completion).

    Args:
        prompts: not looked at.
        completions: not looked at.
        completion_ids: [N] lists of token ids.
        ngram_size: tokens of an n-gram.
        max_penalty: at most 0; what a completion tends to that says one n-gram for ever.
        **columns: not looked at.

    Raises:
        ValueError: an n-gram of no token, or a penalty that is positive or not finite.

    >>> repetition_penalty([""] * 3, [""] * 3, [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]], ngram_size=2)
    [0.0, -0.75, 0.0]
    """
    if ngram_size < 1:
        raise ValueError(f"got ngram_size = {ngram_size}, but an n-gram has at least one token; use 3")
    if not (math.isfinite(max_penalty) and max_penalty <= 0):
        raise ValueError(f"got max_penalty = {max_penalty}, but a penalty is finite and at most 0; use -1.0")
    return [max_penalty * _repeated(ids, ngram_size) or 0.0 for ids in completion_ids]


def _repeated(ids: Sequence[int], size: int) -> float:
    ngrams = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
