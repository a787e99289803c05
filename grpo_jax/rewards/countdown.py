"""Reward 1 for an equation that reaches the target with the given numbers."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.answers import completion_text, last_tag, marked_answer

LONGEST = 200
"""Characters of an expression that is still read."""

_SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-", "$": " "}
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
    what follows an ``=`` in it is not looked at. It may hold numbers, ``+ - * /`` (also ``\times``, ``\div``) and
    round brackets, at most ``LONGEST`` characters; it is computed exactly, with fractions, and never executed. A row
    without ``nums`` or ``target`` gets None.

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
        for completion, numbers, wanted in zip(completions, nums, target, strict=True)
    ]


def _score(text: str, numbers: str | Sequence[Any], wanted: Any, near: float) -> float:
    expression = _expression(text)
    if expression is None:
        return 0.0
    given = re.findall("[0-9]+", numbers) if isinstance(numbers, str) else numbers
    if Counter(map(int, re.findall("[0-9]+", expression))) != Counter(map(int, given)):
        return 0.0
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    return 1.0 if value == Fraction(str(wanted)) else near


def _expression(text: str) -> str | None:
    tagged = last_tag(text, "answer")
    answer = tagged if tagged is not None else _untagged(text)
    answer = answer[: 4 * LONGEST]
    for sign, plain in _SIGNS.items():
        answer = answer.replace(sign, plain)
    expression = answer.partition("=")[0].strip()
    return expression if len(expression) <= LONGEST and _ALLOWED.fullmatch(expression) else None


def _untagged(text: str) -> str:
    if "\\boxed{" in text:
        return marked_answer(text) or ""
    lines = text.rstrip()[-4 * LONGEST :].splitlines()
    return lines[-1] if lines else ""


def _value(node: ast.expr) -> Fraction:
    """The number that an expression of whole numbers and the four operations stands for; ValueError for any other."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic of whole numbers")
