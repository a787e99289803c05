"""Reward 1 where a pattern is found."""

import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.answers import completion_text


def regex(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    pattern: str = "",
    full: bool = False,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion holds a match of ``pattern``, else 0.0.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        pattern: a Python regular expression; flags are written in it, such as ``(?s)`` for a dot that takes newlines.
        full: the match must be the whole completion.
        **columns: not looked at.

    Raises:
        ValueError: no pattern, or one that does not compile.

    >>> regex(["?"] * 3, ["Answer: 7", "seven", "Answer: 7, I think"], [[]] * 3, pattern=r"Answer: \d+")
    [1.0, 0.0, 1.0]
    >>> regex(["?"] * 2, ["Answer: 7", "Answer: 7, I think"], [[]] * 2, pattern=r"Answer: \d+", full=True)
    [1.0, 0.0]
    """
    if not pattern:
        raise ValueError("got no pattern to look for; set reward.options.regex.pattern, such as 'Answer: [0-9]+$'")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"got pattern = {pattern!r}, which is no regular expression ({error}); mend it, and in TOML write it "
            "in single quotes"
        ) from error
    find = compiled.fullmatch if full else compiled.search
    return [1.0 if find(completion_text(completion)) else 0.0 for completion in completions]
