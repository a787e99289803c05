"""From the name of a reward, as a config writes it, to the function."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Reward = Callable[..., Any]
"""``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, plain or ``async def``."""


def reward_name(spec: str | Reward) -> str:
    """The name a reward is logged by: the function's own, or the last part of its spec.

    >>> reward_name("my_rewards.py:brevity"), reward_name("exact_match"), reward_name(len)
    ('brevity', 'exact_match', 'len')
    """
    if isinstance(spec, str):
        return spec.rpartition(":")[2]
    if isinstance(spec, functools.partial):
        return reward_name(spec.func)
    return str(getattr(spec, "__name__", type(spec).__name__))


def find_reward(spec: str, table: Mapping[str, Reward], parameters: Mapping[str, Any]) -> Reward:
    """The function that ``spec`` names, with ``parameters`` bound as keywords.

    Args:
        spec: a name in ``table``, ``module:function``, or ``path/file.py:function`` (relative to the working
            directory).
        table: the built-in rewards by name.
        parameters: keyword arguments every call gets.

    Raises:
        ValueError: no such built-in, module, file or function, or the module does not import.
    """
    function = _find(spec, table)
    if not parameters:
        return function
    bound = functools.partial(function, **parameters)
    return functools.update_wrapper(bound, function, updated=())


def _find(spec: str, table: Mapping[str, Reward]) -> Reward:
    place, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in table:
            raise ValueError(
                f"reward {spec!r}: no built-in of that name; use one of {', '.join(sorted(table))}, "
                "or module:function, or path/file.py:function"
            )
        return table[spec]
    if place == "__main__":
        raise ValueError(
            f"reward {spec!r}: the running script is not run again in the worker; "
            "put the function into a file of its own, or give Trainer the function itself"
        )
    namespace = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    function = namespace.get(name)
    if not callable(function):
        names = sorted(key for key, value in namespace.items() if callable(value) and not key.startswith("_"))
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        known = ", ".join(names[:20]) + more if names else "none"
        raise ValueError(f"reward {spec!r}: {place} has no function {name!r}; use one of those it has: {known}")
    return function


def _load_module(spec: str, place: str) -> dict[str, Any]:
    try:
        return vars(importlib.import_module(place))
    except MemoryError:
        raise  # about the process, as in a call
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: importing {place!r} raised {type(error).__name__}: {error}; "
            "install or repair it, or write path/file.py:function"
        ) from error


def _load_file(spec: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"reward {spec!r}: no file {str(path)!r} under {Path.cwd()}; give the path from there, or all of it"
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: a reward file may import its neighbours but not hide a library
    module_spec = importlib.util.spec_from_file_location(f"_grpo_jax_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except MemoryError:
        raise  # about the process, as in a call
    except Exception as error:
        raise ValueError(
            f"reward {spec!r}: running {path} raised {type(error).__name__}: {error}; repair the file"
        ) from error
    return vars(module)
