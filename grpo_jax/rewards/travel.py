"""The form in which values of a dataset reach another process: what JSON holds, and a stated form of what it does not.

Imports the standard library and NumPy.
"""

import json
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np


def plain(value: Any) -> Any:
    """What stands for a value that JSON does not hold; to be ``json.dumps``' default.

    Arrays are lists and their scalars numbers; dates and times are text as ISO 8601 has it, durations are seconds;
    decimals and UUIDs are their text in full; a mapping is an object.

    Raises:
        TypeError: there is no such form, as of an image or of bytes.
    """
    if isinstance(value, np.ndarray | np.generic):
        kind = value.dtype.kind
        if kind == "M":
            return value.astype(str).tolist()
        if kind == "m":
            return (value.astype("timedelta64[us]").astype(float) / 1e6).tolist()
        if kind in "biufUO":
            return value.tolist()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no form that JSON holds")


def why_it_stays(value: Any) -> str | None:
    """Why a value cannot be sent to another process, in words; None where it can."""
    try:
        json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None
