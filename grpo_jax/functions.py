"""From the name of a user's own function, as a config writes it, to the function."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


@functools.cache
def load_function(spec: str) -> Callable[..., Any]:
    """The function that ``spec`` names; loaded once, so that it is the same object wherever it is asked for.

    Args:
        spec: ``module:function``, or ``path/file.py:function`` relative to the working directory.

    Raises:
        ValueError: no such module, file or function, or it does not import.
    """
    place, _, name = spec.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"got {spec!r}, and loading {place!r} raised {type(error).__name__}: {error}. Repair it, or write "
            "module:function or path/file.py:function."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"got {spec!r}, and {place} has no function {name!r}. Name one that it defines.")
    return function


def _load_file(path: Path) -> ModuleType:
    name = f"_grpo_jax_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
