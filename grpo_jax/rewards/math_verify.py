"""Reward 1 for an answer that is mathematically the right one, by the math-verify package."""

import functools
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.answers import behind_hashes, completion_text, enclosed_answer, reference_text
from grpo_jax.rewards.equality import meaning, plain_signs, same

TAIL = 1000
"""Characters at the end of a completion in which an answer without a box is looked for."""

_MIXED = re.compile(r"(?<![0-9.] )\b([0-9]+) ([0-9]+)/([0-9]+)\b")
_TEXT = re.compile(r"[0-9] [0-9]|://|\b[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}\b|\b[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}\b")
_UNREAD = re.compile(r"\\?\$|[€£¥₹]|^[*_`\s]+|[*_`\s]+$")


def math_verify(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    max_answer_chars: int = 300,
    timeout_seconds: int = 2,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's final answer equals the ``answer`` column's as mathematics, else 0.0.

    The answer is what stands in the last ``<answer>...</answer>``, in the last ``\boxed{}``, or behind the last
    ``####``; where none of these is there, math-verify looks for one in the last ``TAIL`` characters. Answers that are
    the same text (``equality.same``) are right without being parsed; an answer longer than ``max_answer_chars`` is
    wrong without being parsed, and so is one in another currency or unit. A date, an address or numbers with white
    space between them are text, no sum or product. A row whose ``answer`` is missing, or that math-verify makes nothing
    of, gets None.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        answer: [N] reference answers, LaTeX or plain, or solutions that end in a box.
        max_answer_chars: longest answer that is parsed.
        timeout_seconds: for one parse and for one comparison, by a signal, so in the main thread only (a reward that
            a config names has a process with one); an answer out of time is wrong.
        **columns: not looked at.

    Raises:
        ValueError: the package is not installed.

    >>> said = [r"Hence \boxed{0.5}.", r"\boxed{\frac{2}{4}}", r"The final answer is $\frac{1}{3}$."]
    >>> math_verify(["2/4"] * 3, said, [[]] * 3, answer=[r"\frac{1}{2}"] * 3)
    [1.0, 1.0, 0.0]
    """
    equal = _comparison(timeout_seconds)
    return [
        None if wanted is None else _score(completion_text(completion), wanted, max_answer_chars, equal)
        for completion, wanted in zip(completions, map(reference_text, answer), strict=True)
    ]


def math_answer(text: str) -> str | None:
    """The answer in the last tags or box, or behind the last ``####``; None where a text has none of these."""
    enclosed = enclosed_answer(text)
    return behind_hashes(text) if enclosed is None else enclosed


def _score(text: str, wanted: str, longest: int, equal: Callable[[str, str], bool | None]) -> float | None:
    said, right = math_answer(text), math_answer(wanted)
    shown, right = text if said is None else said, wanted if right is None else right
    if len(shown) <= longest and same(shown, right, latex=True):
        return 1.0
    if said is not None and not 0 < len(said) <= longest:
        return 0.0
    if len(shown) <= longest and len(right) <= longest and _only_text(shown, right):
        return 0.0
    verdict = equal(
        _in_box(right) if len(right) <= longest else right[-TAIL:],
        text[-TAIL:] if said is None else _in_box(said),
    )
    return None if verdict is None else float(verdict)


def _only_text(said: str, right: str) -> bool:
    """Whether answers that differ as text are no equal mathematics: a date, an address, a row of numbers, two units."""
    one, other = meaning(said, latex=True), meaning(right, latex=True)
    units = {one.unit, other.unit} - {None}
    return len(units) > 1 or any(_TEXT.search(_MIXED.sub("", answer.value)) for answer in (one, other))


def _in_box(answer: str) -> str:
    """An answer as math-verify finds it before all else, in signs that it reads."""
    mixed = _MIXED.sub(r"\1\\frac{\2}{\3}", " ".join(plain_signs(answer).split()))
    return "\\boxed{" + _UNREAD.sub("", mixed).replace("°", "^\\circ") + "}"


def _comparison(timeout_seconds: int) -> Callable[[str, str], bool | None]:
    """(text with the right answer, text with an answer) -> equal, or None where the right one means nothing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "needs the package math-verify, which is not installed; pip install grpo_jax[math], or use the reward "
            "'boxed', which compares text"
        )
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    for part in ("parser", "grader", "utils"):
        logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)  # it tells of every answer out of time
    limit = timeout_seconds if threading.current_thread() is threading.main_thread() else None

    @functools.cache
    def parsed(text: str) -> Any:
        try:
            return parse(text, parsing_timeout=limit)
        except TimeoutException:  # a BaseException, which can still come when the alarm goes off late
            return []

    def same(right: str, text: str) -> bool | None:
        gold = parsed(right)
        if not gold:
            return None
        try:
            return bool(verify(gold, parsed(text), timeout_seconds=limit))
        except TimeoutException:
            return False

    return same
