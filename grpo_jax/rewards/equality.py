"""When two answers are the same: one way to write each, and what one may say that the other leaves out."""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

LONGEST = 2000
"""Characters up to which an answer is rewritten; a longer one is compared as it stands, but for case and space."""

_SIGNS = {
    **dict.fromkeys("−﹣－‐‑–", "-"),
    **dict.fromkeys("×⋅·∙∗", "*"),
    **dict.fromkeys("÷⁄∕", "/"),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("‘’", "'"),
    **{"。": ".", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in "},
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D},
}
_CURRENCIES = "€£¥₹"
_DOLLARS = re.compile(r"\$\s*[+-]?[0-9.]")
_GROUPED = re.compile(r"(?<![0-9,.(\[])(?<!\\\{)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_THIN = re.compile(r"(?<=[0-9])(?:\\[,!]|~|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_MIXED = re.compile(r"(?<=\d) ?(?=[\u00bc-\u00be\u2150-\u215e])")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_REWRITTEN = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"√\s*([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\{,\}", ","),
        (r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!", ""),
        (r"\\q?quad(?![a-zA-Z])|\\[,;: ]|~|\\[()\[\]]", " "),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"(?<=[0-9])\s*\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r" \1/\2"),
        (r"\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\1/\2"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\leq(?![a-zA-Z])|<=", r"\\le "),
        (r"\\geq(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})", "°"),
        (r"([\^_])\{(\w)\}", r"\1\2"),
        (r"\\([%#&_])", r"\1"),
    )
]
_LABEL = re.compile(r"(?:the )?(?:final )?answer\W{0,3}:\s*")
_HEADING = re.compile(r"#{1,6}\s+")
_EMPHASIS = re.compile(r"^([*`]{1,3}|_{1,3}(?=[0-9.+-]+_))(.+?)([*`_]{1,3})$", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(?![\w.])")
_EXACT = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400}|/[0-9]{1,400})?")
_LEADING_SIGN = re.compile(r"(^|[,;=(\[{]\s*)(?:\+\s*(?=[.0-9])|-\s*(?=0(?![\w.])))")
_SPACE = re.compile(r"(?<![^\W_]) +| +(?![^\W_])")
_LATEX_SPACE = re.compile(r"(?<![0-9]) +| +(?![0-9])")
_NAME = re.compile(r"\\?[a-z]+(?: [a-z]+){0,3}(?:_(?:\w|\{\w+\}))?'*(?:\([a-z](?:, [a-z])*\))?")
_ARITHMETIC = re.compile(r"[0-9+\-*/^().,%= ]+")


class Meaning(NamedTuple):
    """An answer in one way of writing.

    Attributes:
        value: what it says, "" for nothing.
        name: of what: ``x`` in ``x = 5``; None where it does not say.
        unit: a currency's sign, ``%`` or ``°``; None where it does not say.
    """

    value: str
    name: str | None = None
    unit: str | None = None


def same(left: str, right: str, latex: bool = False) -> bool:
    r"""Whether two answers are the same: equal values, and of names and units nothing that both say differently.

    An empty answer is the same as none.

    Args:
        left: an answer.
        right: another.
        latex: as for ``meaning``.

    >>> same("y = 2x + 1", "2x+1"), same("x = 5", "y = 5"), same(r"\$5", "5"), same("1 2", "12"), same("$5", "€5")
    (True, False, True, False, False)
    """
    one, other = meaning(left, latex), meaning(right, latex)
    agree = all(a is None or b is None or a == b for a, b in zip(one[1:], other[1:], strict=True))
    return bool(one.value) and one.value == other.value and agree


def any_same(left: Sequence[str], right: Sequence[str], latex: bool = False) -> bool:
    """Whether an answer of ``left`` is the same as one of ``right``."""
    return any(same(one, other, latex) for one in left for other in right)


def normalise(answer: str, latex: bool = False) -> str:
    r"""The value of an answer, written so that equal strings are equal answers.

    Case, white space that separates neither words nor numbers, a full stop at the end, Markdown's headings and
    emphasis, dollars and other currencies, thousands separators, escapes, which of Unicode's signs is used, the
    way a decimal number is written, and what only sets LaTeX do not count.

    >>> normalise(" $1,200.50. "), normalise("-0.0"), normalise("New  York"), normalise("**x = 5.0**")
    ('1200.5', '0', 'new york', '5')
    >>> normalise(r"$\left( \dfrac{1}{2},\, 3 \right)$"), normalise("1 2"), normalise("100, 200")
    ('(1/2, 3)', '1 2', '100, 200')
    """
    return meaning(answer, latex).value


def meaning(answer: str, latex: bool = False) -> Meaning:
    """What an answer says, in one way of writing.

    Args:
        answer: text.
        latex: white space between letters does not count either.
    """
    if len(answer) > LONGEST:
        return Meaning(" ".join(answer.split()).casefold())
    text = _without_layout(plain_signs(answer))
    text, unit = _without_unit(text)
    text = _in_one_way(text.casefold(), latex)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and value and _NAME.fullmatch(name):
        return Meaning(value, name, unit)
    start, equals, value = text.rpartition("=")
    return Meaning(value if equals and value and _ARITHMETIC.fullmatch(start) else text, None, unit)


def plain_signs(text: str) -> str:
    """A text in ASCII's digits and signs where Unicode has others: minus, times, raised digits, fractions.

    >>> plain_signs("−３½ × x²")
    '-3 1/2 * x^2'
    """
    if text.isascii():
        return text
    text = _THIN.sub("", text)
    text = _MIXED.sub(" ", text)
    text = _RAISED.sub(lambda run: "^" + _grouped(unicodedata.normalize("NFKC", run.group())), text)
    text = _LOWERED.sub(lambda run: "_" + _grouped(unicodedata.normalize("NFKC", run.group())), text)
    return "".join(letter if letter.isascii() else _plain_sign(letter) for letter in text)


def exact_value(value: str) -> Fraction | None:
    """The number that a value stands for, a decimal or a fraction; None for anything else.

    >>> exact_value("0.5"), exact_value("-3/6"), exact_value("x")
    (Fraction(1, 2), Fraction(-1, 2), None)
    """
    try:
        return Fraction(value) if _EXACT.fullmatch(value) else None
    except ZeroDivisionError:
        return None


def _grouped(digits: str) -> str:
    digits = digits.replace("−", "-")
    return digits if len(digits) == 1 else f"{{{digits}}}"


def _plain_sign(letter: str) -> str:
    if letter in _SIGNS:
        return _SIGNS[letter]
    if (digit := unicodedata.decimal(letter, None)) is not None:
        return str(digit)
    fraction = unicodedata.normalize("NFKC", letter)
    return fraction.replace("⁄", "/") if "⁄" in fraction else letter


def _without_layout(text: str) -> str:
    """Without what only sets a text: LaTeX's layout, escapes, Markdown around the whole, a full stop at the end."""
    text = _THIN.sub("", text)
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    text = _HEADING.sub("", text.strip(), count=1) if text.lstrip().startswith("#") else text
    for _ in range(3):
        text = text.strip().removesuffix(".").strip()
        if text.endswith("**") and text.count("**") == 1:
            text = text.removesuffix("**")
        marked = _EMPHASIS.match(text)
        if marked is not None and marked[1] == marked[3][::-1]:
            text = marked[2]
    return text


def _without_unit(text: str) -> tuple[str, str | None]:
    """A text without its dollars, the sign of another currency, percent and degrees; and which of them it had."""
    unit = next((sign for sign in _CURRENCIES if sign in text), None)
    if unit is not None:
        text = text.replace(unit, " ")
    if unit is None and ("\\$" in text or (text.count("$") == 1 and _DOLLARS.search(text))):
        unit = "$"
    text = re.sub(r"\\?\$", " ", text).strip().removesuffix(".").strip()
    if text.endswith(("%", "°")) and unit is None:
        text, unit = text[:-1].strip(), text[-1]
    return text, unit


def _in_one_way(text: str, latex: bool) -> str:
    """Numbers, separators and white space in one way."""
    text = _LABEL.sub("", " ".join(text.split()), count=1) if "answer" in text[:20] else " ".join(text.split())
    text = _GROUPED.sub(lambda number: number.group().replace(",", ""), text)
    text = _NUMBER.sub(_plain_number, text)
    text = _LEADING_SIGN.sub(r"\1", text)
    text = (_LATEX_SPACE if latex else _SPACE).sub("", text)
    return re.sub(r"([,;])(?=.)", r"\1 ", text)


def _plain_number(number: re.Match[str]) -> str:
    whole, fraction = number.groups(default="")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{fraction}" if fraction else "")
