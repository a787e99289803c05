"""Reward 1 for the right number behind ####."""

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import behind_hashes, completion_text, enclosed_answer, reference_text
from grpo_jax.rewards.equality import normalise, plain_signs

_NUMBER = re.compile(
    r"(?:(?<![0-9a-zA-Z)])[+-] ?)?(?:\\?[$€£¥₹] ?)?(?<![0-9.])(?<![0-9][-/:^ ])"
    r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?![0-9]|[-/:.^ ][0-9]|[eE][0-9+-])"
)
"""A number that is no part of a date, a fraction, a time, a power or a row of numbers."""


def gsm8k(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    flexible: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the number behind the completion's last ``####`` is that of the ``answer`` column, else 0.0.

    The column holds GSM8K's own workings, which end in ``#### 72``, or the number alone. Dollar signs and thousands
    separators do not count; of what follows ``####`` in its line the first number does, or the first behind the last
    ``=`` (GSM8K, arXiv 2110.14168); a part of a date or a fraction is none. A row whose ``answer`` is missing or has no
    number gets None.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        answer: [N] reference solutions or numbers.
        flexible: without ``####``, take the last number in a box or answer tags, else of the completion.
        **columns: not looked at.

    >>> gsm8k(["?"] * 3, ["6 * 12 = 72\\n#### 72", "72", "#### $1,072"], [[]] * 3, answer=["so\\n#### 72"] * 3)
    [1.0, 0.0, 0.0]
    >>> gsm8k(["?"], ["It is 72 dollars."], [[]], answer=["72"], flexible=True)
    [1.0]
    """
    wanted = [
        None if reference is None else stated_number(reference, True) for reference in map(reference_text, answer)
    ]
    got = [stated_number(completion_text(completion), flexible) for completion in completions]
    return [None if right is None else float(said == right) for said, right in zip(got, wanted, strict=True)]


def stated_number(text: str, flexible: bool) -> str | None:
    """The number behind the last ``####``, in one way of writing; None where there is none.

    Args:
        text: of a completion or a reference.
        flexible: without ``####``, take the last number in a box or answer tags, else of the text.
    """
    behind = behind_hashes(text)
    if behind is not None:
        found = _NUMBER.search(plain_signs(behind.rpartition("=")[2]))
    elif flexible:
        enclosed = enclosed_answer(text)
        numbers = _NUMBER.finditer(plain_signs(text if enclosed is None else enclosed))
        found = next(iter(deque(numbers, maxlen=1)), None)
    else:
        found = None
    return None if found is None else normalise(re.sub(r"[^-+0-9.,]", "", found.group()).rstrip(","))
