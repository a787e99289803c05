"""Reading one field of a config.json: what it must be, and the error that names it. Standard library only."""

from collections.abc import Mapping
from sys import float_info
from typing import Any

Config = Mapping[str, Any]

LARGEST = 2**31 - 1
"""Of a size: what an array's axis can have."""

MOST_SHOWN = 80
"""Characters of a value that an error shows."""


def config_error(name: str, got: Any, why: str, do: str) -> ValueError:
    """The error about the field ``name``."""
    shown = repr(got)
    shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
    return ValueError(f"config.json: {name}: got {shown}; {why}; {do}")


def read_flag(config: Config, name: str) -> bool:
    """true or false; absent and null are false."""
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise config_error(name, value, "true or false is needed", "check the config")


def read_size(config: Config, name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number from ``least`` to `LARGEST`; ``default`` where it is absent or null."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        why = f"a whole number of at least {least} is needed" if _below(value, LARGEST) else f"it is above {LARGEST}"
        raise config_error(name, value, why, "check that the config is whole")
    return value


def read_number(config: Config, name: str, default: float | None = None, inside: str = "") -> float:
    """A finite number above 0; ``default`` where it is absent or null. ``inside`` is the object it lies in."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= float_info.max:
        where = f"{inside}.{name}" if inside else name
        raise config_error(where, value, "a number above 0 is needed", "check that the config is whole")
    return float(value)


def read_table(config: Config, name: str) -> dict[str, Any]:
    """An object; empty where it is absent or null."""
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise config_error(name, value, "an object is needed", "check the config")
    return dict(value)


def read_cap(config: Config, name: str) -> float | None:
    """A finite number above 0, or None where it is absent or null."""
    return None if config.get(name) is None else read_number(config, name)


def _below(value: Any, most: int) -> bool:
    return not isinstance(value, int) or value <= most
