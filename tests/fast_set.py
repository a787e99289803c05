"""Which rows of a table are in the fast set: those that span its mechanisms; the others are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters of a test, all marked slow but those named; a name that is no case is a mistake."""
    listed = list(cases)
    unknown = [case for case in fast if case not in listed]
    assert not unknown, unknown
    return [case if case in fast else pytest.param(*_values(case), marks=pytest.mark.slow) for case in listed]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
