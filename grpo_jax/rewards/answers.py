"""How a final answer is read out of a text, a completion's and a reference's alike."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

MISSING = frozenset(
    ["", "NaN", "nan", "NaT", "NA", "<NA>", "N/A", "n/a", "#N/A", "#NA", "-nan", "-NaN", "NULL", "null", "None"]
)
"""Texts that a value which is not there leaves behind, as pandas reads and writes them."""

_BOX = "\\boxed{"
_MIDNIGHT = re.compile(r"[T ]00:00:00(?:\.0+)?(?:Z|\+00:00)?$")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_ANSWER = re.compile(r"\banswer[*_]{0,3}\s?[:：][*_]{0,3}", re.IGNORECASE)
_LABEL = re.compile(r"[*_\s]*(?:the )?(?:final )?answer[*_\s]*", re.IGNORECASE)
_EQUALS = re.compile(r"(?<![<>!=:])=(?![=>])")
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_(?:\w|\{\w+\}))?'*(?:\([a-zA-Z]\))?")


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of the last of its chat messages.

    Content in parts is the text of its parts; no content is no text.

    >>> completion_text([{"role": "assistant", "content": [{"type": "text", "text": "7"}]}])
    '7'
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else None
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def missing(value: Any) -> bool:
    """Whether a value of a column is not there: None, NaN, NaT, pandas' NA, or one of the texts ``MISSING``.

    >>> [missing(value) for value in (None, float("nan"), " ", "null", 0, "0", [])]
    [True, True, True, True, False, False, False]
    """
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip() in MISSING
    try:
        return bool(value != value)
    except (TypeError, ValueError, ArithmeticError):  # pandas' NA says neither yes nor no, nor does an array
        return str(value) in MISSING


def reference_text(value: Any) -> str | None:
    """The text of a reference answer, or None where it is missing.

    A number is written out, a whole one without a point; a time at midnight is its date; a list is its values with
    commas between them.

    >>> [reference_text(value) for value in (7, 1e-05, 2.5e21, ["3", 4.0], float("nan"), "x = 5")]
    ['7', '0.00001', '2500000000000000000000', '3, 4', None, 'x = 5']
    """
    if missing(value):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        parts = [reference_text(part) for part in value]
        return None if not parts or None in parts else ", ".join(map(str, parts))
    if getattr(getattr(value, "dtype", None), "kind", "M") in "biufUO":  # NumPy's, arrays too; its times are text
        return reference_text(value.tolist())
    if isinstance(value, float | Decimal) and math.isfinite(value):
        whole = value == value.to_integral_value() if isinstance(value, Decimal) else value.is_integer()
        return str(int(value)) if whole else f"{Decimal(str(value)):f}"
    return _MIDNIGHT.sub("", str(value))


def readings(text: str) -> list[str]:
    """The answers that a text can be taken to give: the one that it marks by tags, a box, ``####`` or ``Answer:``.

    Where it marks none so, the whole text, stripped, and what its last ``=`` says. A completion and a reference are
    read alike.

    >>> readings("so #### 72"), readings("3 + 4 = 7"), readings("https://a.org/?q=1")
    (['72'], ['3 + 4 = 7', '7'], ['https://a.org/?q=1'])
    """
    marked, sure = _marked(text)
    if sure:
        return [] if marked is None else [marked]
    return [text.strip()] if marked is None else [text.strip(), marked]


def marked_answer(text: str) -> str | None:
    r"""The answer that a text marks as final, or None where it marks none.

    The first of these that the text holds decides, each at its last occurrence: what stands between ``<answer>`` and
    ``</answer>``, or in a box there; what is inside ``\boxed{}`` (braces balanced; a box that never closes is no
    box); what follows ``####`` or ``Answer:``, whichever comes later; what follows ``=``, with the name before it.
    What follows a marker is cut at the end of its line and stripped; an empty rest is None.

    >>> marked_answer("3 + 4 = 7"), marked_answer("so #### 1,200\nDone."), marked_answer(r"\boxed{\frac{1}{2}}")
    ('7', '1,200', '\\frac{1}{2}')
    >>> marked_answer("#### Step 2\nHence \\boxed{y = 4}."), marked_answer("so y = 4")
    ('y = 4', 'y = 4')
    """
    return _marked(text)[0]


def final_answer(text: str) -> str:
    """The marked answer of a text, or the whole text, stripped, where nothing is marked.

    >>> final_answer(" 42 ")
    '42'
    """
    marked = marked_answer(text)
    return text.strip() if marked is None else marked


def enclosed_answer(text: str) -> str | None:
    """What stands in the last box, or in the last answer tags, or in a box in these; None where neither is there."""
    tagged = last_tag(text, "answer")
    boxed = last_box(text if tagged is None else tagged)
    return tagged if boxed is None else boxed.strip()


def behind_hashes(text: str) -> str | None:
    """What follows the last ``####``; None where there is none. Five of them are a heading of Markdown."""
    start = _last_end(_HASHES, text)
    return None if start is None else _rest(text, start) or ""


def _marked(text: str) -> tuple[str | None, bool]:
    """The marked answer, and whether by more than an equals sign."""
    enclosed = enclosed_answer(text)
    if enclosed is not None:
        return enclosed or None, True
    start = max(_last_end(_HASHES, text) or 0, _last_end(_ANSWER, text) or 0)
    if start:
        return _rest(text, start), True
    return _equated(text), False


def _rest(text: str, start: int) -> str | None:
    """The rest of the line, or of the next one where this one only says that the answer comes."""
    rest = rest_of_line(text, start)
    if rest is not None and len(rest) < 30 and _LABEL.fullmatch(rest):
        return rest_of_line(text, text.index(rest, start) + len(rest)) or rest
    return rest


def _equated(text: str) -> str | None:
    """What follows the last ``=``, behind the name it has; None for one in a comparison or an address."""
    end = _last_end(_EQUALS, text)
    if end is None:
        return None
    before = text[max(text.rfind("\n", 0, end) + 1, end - 200) : end - 1].split()
    word = before[-1].lstrip("$*(") if before else ""
    if "://" in word or re.search(r"\?\w+$", word):
        return None
    rest = rest_of_line(text, end)
    return f"{word} = {rest}" if rest is not None and _NAME.fullmatch(word) else rest


def _last_end(pattern: re.Pattern[str], text: str) -> int | None:
    """Where the last match of a pattern ends."""
    last = deque(pattern.finditer(text), maxlen=1)
    return last[0].end() if last else None


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
