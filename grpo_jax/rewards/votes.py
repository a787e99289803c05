"""The answer of a completion as each built-in reads it, for figures that count answers (maj@k)."""

import re
from collections import deque
from collections.abc import Callable

from grpo_jax.rewards.answers import final_answer, last_box, marked_answer
from grpo_jax.rewards.countdown import expression_of
from grpo_jax.rewards.equality import exact_value, normalise
from grpo_jax.rewards.gsm8k import stated_number
from grpo_jax.rewards.math_verify import TAIL, math_answer

_SHOWN = re.compile(r"\$([^$]+)\$|\\\(([^()]+)\\\)|([+-]?[0-9][0-9,.]*)")


def vote_of(reward: str) -> Callable[[str], str | None]:
    r"""What reads a completion for ``reward``: equal answers are equal texts, and None is no answer.

    A reward that is not built in, or that looks for no answer, counts by the rule of ``exact_match``.

    >>> vote_of("boxed")(r"so \boxed{\dfrac{1}{2}} = 0.5"), vote_of("gsm8k")("so\n#### $1,072"), vote_of("boxed")("7")
    ('1/2', '1072', None)
    """
    return VOTES.get(reward, _exact)


def _exact(text: str) -> str | None:
    return normalise(final_answer(text)) or None


def _boxed(text: str) -> str | None:
    return normalise(last_box(text) or "", latex=True) or None


def _gsm8k(text: str) -> str | None:
    return stated_number(text, flexible=False)


def _math_verify(text: str) -> str | None:
    """Numbers by their value. Where nothing is marked, the last formula or number, as math-verify looks for one."""
    said = math_answer(text) or marked_answer(text)
    if said is None:
        last = deque(_SHOWN.finditer(text[-TAIL:]), maxlen=1)
        said = next((part for part in last[0].groups() if part), None) if last else None
    value = normalise(said or "", latex=True)
    number = exact_value(value)
    return (value if number is None else str(number)) or None


def _quickstart(text: str) -> str | None:
    from grpo_jax.quickstart.task import parse

    return parse(text)


VOTES: dict[str, Callable[[str], str | None]] = {
    "exact_match": _exact,
    "boxed": _boxed,
    "gsm8k": _gsm8k,
    "math_verify": _math_verify,
    "countdown": expression_of,
    "quickstart": _quickstart,
}
"""By the name of a built-in."""
