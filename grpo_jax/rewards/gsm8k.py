"""Reward 1 for the right number behind ####."""

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text, normalise, rest_of_line

_NUMBER = re.compile(r"[+-]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


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
    separators do not count; of what follows ``####`` the first number of the first line does (GSM8K, arXiv
    2110.14168). A row whose ``answer`` is None or has no number gets None.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        answer: [N] reference solutions or numbers.
        flexible: without ``####``, take the last number of the completion.
        **columns: not looked at.

    >>> gsm8k(["?"] * 3, ["6 * 12 = 72\\n#### 72", "72", "#### $1,072"], [[]] * 3, answer=["so\\n#### 72"] * 3)
    [1.0, 0.0, 0.0]
    >>> gsm8k(["?"], ["It is 72 dollars."], [[]], answer=["72"], flexible=True)
    [1.0]
    """
    wanted = [None if reference is None else _number(str(reference), True) for reference in answer]
    got = [_number(completion_text(completion), flexible) for completion in completions]
    return [None if right is None else float(said == right) for said, right in zip(got, wanted, strict=True)]


def _number(text: str, flexible: bool) -> str | None:
    start = text.rfind("####")
    if start >= 0:
        found = _NUMBER.search(rest_of_line(text, start + 4) or "")
    elif flexible:
        found = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    else:
        found = None
    return None if found is None else normalise(found.group().replace("$", "").rstrip(","))
