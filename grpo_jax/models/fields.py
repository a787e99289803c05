"""Reading one field of a config.json: what it must be, and the error that names it. Standard library only."""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def config_error(name: str, got: Any, why: str, do: str) -> ValueError:
    """The error about the field ``name``."""
    return ValueError(f"config.json: {name}: got {got!r}; {why}; {do}")


def read_flag(config: Config, name: str) -> bool:
    """true or false; absent and null are false."""
    value = config.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise config_error(name, value, "true or false is needed", "check the config")


def read_size(config: Config, name: str, default: int | None = None) -> int:
    """A whole number of at least 1; ``default`` where it is absent or null."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise config_error(name, value, "a whole number of at least 1 is needed", "check that the config is whole")
    return value


def read_number(config: Config, name: str, default: float | None = None, inside: str = "") -> float:
    """A finite number above 0; ``default`` where it is absent or null. ``inside`` is the object it lies in."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        where = f"{inside}.{name}" if inside else name
        raise config_error(where, value, "a number above 0 is needed", "check that the config is whole")
    return float(value)


def read_cap(config: Config, name: str) -> float | None:
    """A finite number above 0, or None where it is absent or null."""
    return None if config.get(name) is None else read_number(config, name)
