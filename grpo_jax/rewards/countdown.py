"""Reward 1 for an equation that reaches the target with the given numbers."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.answers import completion_text, enclosed_answer, missing, reference_text
from grpo_jax.rewards.equality import exact_value, normalise, plain_signs

LONGEST = 200
"""Characters of an expression that is still read."""

_SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": " ", r"\right": " ", "\\(": " ", "\\)": " ", "$": " "}
_LABEL = re.compile(r"^(?:[*_#\s]*(?:final )?answer[*_\s]*:)?[*_`\s]*", re.IGNORECASE)
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    nums: Sequence[Any],
    target: Sequence[Any],
    near: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the answer is an expression of the numbers in ``nums``, each used once, that equals ``target``.

    The answer is what stands in the last ``<answer>...</answer>``, else in the last ``\boxed{}``, else the last line;
    of an equation the first side that computes something counts. It may hold numbers, ``+ - * /`` (also ``\times``,
    ``\div``) and round brackets, at most ``LONGEST`` characters; it is computed exactly, with fractions, and never
    executed. A row whose ``nums`` or ``target`` are missing or no numbers gets None.

    Args:
        prompts: not looked at.
        completions: [N] strings or lists of messages.
        completion_ids: not looked at.
        nums: [N] lists of whole numbers, or texts with them, as a CSV file has.
        target: [N] numbers to reach.
        near: reward of an expression that uses each number once and misses the target.
        **columns: not looked at.

    >>> said = ["<answer>(3 + 5) * 4</answer>", "<answer>3 + 5 + 4</answer>", "<answer>8 * 4</answer>"]
    >>> countdown(["?"] * 3, said, [[]] * 3, nums=[[3, 4, 5]] * 3, target=[32] * 3, near=0.1)
    [1.0, 0.1, 0.0]
    """
    return [
        None if numbers is None or wanted is None else _score(completion_text(completion), numbers, wanted, near)
        for completion, numbers, wanted in zip(
            completions, map(_whole_numbers, nums), map(_target, target), strict=True
        )
    ]


def expression_of(text: str) -> str | None:
    """The expression that a completion gives as its answer, in ASCII; None where it gives none that is read."""
    enclosed = enclosed_answer(text)
    lines = text.rstrip()[-4 * LONGEST :].splitlines()
    answer = enclosed if enclosed is not None else lines[-1] if lines and "\\boxed{" not in text else ""
    answer = plain_signs(answer[: 4 * LONGEST])
    for sign, plain in _SIGNS.items():
        answer = answer.replace(sign, plain)
    sides = [side.strip() for side in _LABEL.sub("", answer).rstrip("*_`. \t").split("=")]
    computing = (side for side in sides if _ALLOWED.fullmatch(side) and not side.isdigit())
    expression = next(computing, sides[0])
    return expression if len(expression) <= LONGEST and _ALLOWED.fullmatch(expression) else None


def _whole_numbers(nums: Any) -> Counter[int] | None:
    """The numbers of a row, each as often as it is given; None where one is missing or not whole."""
    if missing(nums):
        return None
    values = map(exact_value, re.findall(r"[-.\w]+", nums)) if isinstance(nums, str) else map(_target, nums)
    whole = [int(value) if value is not None and value.denominator == 1 else None for value in values]
    return None if None in whole or not whole else Counter(value for value in whole if value is not None)


def _target(value: Any) -> Fraction | None:
    text = reference_text(value)
    return None if text is None else exact_value(normalise(text))


def _score(text: str, numbers: Counter[int], wanted: Fraction, near: float) -> float:
    expression = expression_of(text)
    if expression is None or Counter(map(int, re.findall("[0-9]+", expression))) != numbers:
        return 0.0
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    return 1.0 if value == wanted else near


def _value(node: ast.expr) -> Fraction:
    """The number that an expression of whole numbers and the four operations stands for; ValueError for any other."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic of whole numbers")
