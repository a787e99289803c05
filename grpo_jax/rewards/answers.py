"""How a final answer is read out of a text, and when two answers are the same."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_BOX = "\\boxed{"
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|[$\s]")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of the last of its chat messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""


def marked_answer(text: str) -> str | None:
    r"""The answer that a text marks as final, or None where it marks none.

    The first of these that the text holds decides, each at its last occurrence: what stands between ``<answer>`` and
    ``</answer>``; what follows ``####``; what is inside ``\boxed{}`` (braces balanced; a box that never closes is no
    box); what follows ``=`` or ``Answer:``, whichever comes later. What follows a marker is cut at the end of its
    line and stripped; an empty rest is None.

    >>> marked_answer("3 + 4 = 7"), marked_answer("so #### 1,200\nDone."), marked_answer(r"\boxed{\frac{1}{2}}")
    ('7', '1,200', '\\frac{1}{2}')
    """
    tagged = last_tag(text, "answer")
    if tagged is not None:
        return tagged or None
    start = text.rfind("####")
    if start >= 0:
        return rest_of_line(text, start + 4)
    boxed = last_box(text)
    if boxed is not None:
        return boxed.strip() or None
    start = max(text.rfind("=") + 1, text.rfind("Answer:") + len("Answer:") if "Answer:" in text else 0)
    return rest_of_line(text, start) if start else None


def final_answer(text: str) -> str:
    """The marked answer of a text, or the whole text, stripped, where nothing is marked.

    >>> final_answer(" 42 ")
    '42'
    """
    marked = marked_answer(text)
    return text.strip() if marked is None else marked


def normalise(answer: str) -> str:
    """An answer without what does not change its meaning, so that equal strings are equal answers.

    White space runs become one space, a trailing full stop, dollar signs and thousands separators go, case is
    folded, and a plain decimal number is written in one way.

    >>> normalise(" $1,200.50. "), normalise("-0.0"), normalise("New  York")
    ('1200.5', '0', 'new york')
    """
    plain = " ".join(answer.replace("$", " ").split()).removesuffix(".").strip().casefold()
    number = _NUMBER.fullmatch(_THOUSANDS.sub("", plain))
    if number is None:
        return plain
    sign, whole, fraction = number.groups(default="")
    fraction = fraction.rstrip("0")
    value = (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return value if value == "0" or sign != "-" else f"-{value}"


def normalise_latex(answer: str) -> str:
    r"""An answer without what changes only how LaTeX sets it: sizes of brackets and fractions, fonts, space, dollars.

    >>> normalise_latex(r"$\left( \dfrac{1}{2},\, 3 \right)$"), normalise_latex(r"\text{North} 1,200")
    ('(\\frac{1}{2},3)', 'north1,200')
    """
    return normalise(_FRACTION.sub(r"\\frac", _LAYOUT.sub("", _WORDS.sub(r"\1", answer))))


def rest_of_line(text: str, start: int) -> str | None:
    """The first line with anything on it from ``start`` on, stripped; None where there is none."""
    lines = text[start:].lstrip().splitlines()
    return (lines[0].strip() or None) if lines else None


def last_tag(text: str, tag: str) -> str | None:
    """What stands, stripped, in the last ``<tag>...</tag>`` of a text; None where no such pair is there.

    >>> last_tag("<answer>1</answer> or <answer> 2 </answer>", "answer")
    '2'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len(tag) + 2 : end].strip()


def thought_and_rest(text: str, opened: bool) -> tuple[str, str] | None:
    """The two parts of ``<think>thought</think> rest``, stripped; None where a text is not of that form.

    Args:
        text: of a completion.
        opened: the prompt ends with ``<think>`` already, so that the completion does not begin with it.
    """
    body = text.strip() if opened else text.strip().removeprefix("<think>")
    if (not opened and body == text.strip()) or "<think>" in body or body.count("</think>") != 1:
        return None
    thought, _, rest = body.partition("</think>")
    return thought.strip(), rest.strip()


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}`` of a text, its braces balanced; None where it is missing or not closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 1
    for brace in re.finditer(r"[{}]", text[start + len(_BOX) :]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + len(_BOX) : start + len(_BOX) + brace.start()]
    return None
