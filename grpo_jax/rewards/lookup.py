"""From the name of a reward, as a config writes it, to the function with its options."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.functions import find_function, nearest

Reward = Callable[..., Any]
"""``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, plain or ``async def``."""

SAMPLES = ("prompts", "completions", "completion_ids")
"""Arguments that hold the completions."""
HANDED = ("trainer_state", "log_extra", "log_metric")
"""Arguments that the run hands to a function that takes them."""
RESERVED = SAMPLES + HANDED
"""Argument names that a dataset's column and an option cannot have."""


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


def unique_names(specs: Sequence[str | Reward]) -> tuple[str, ...]:
    """The name of each reward of a run: ``reward_name``, with _2, _3 behind those that come again.

    >>> unique_names(["regex", "exact_match", "regex"])
    ('regex', 'exact_match', 'regex_2')
    """
    unique: list[str] = []
    for name in map(reward_name, specs):
        copies = (f"{name}_{number}" for number in range(2, len(specs) + 2))
        unique.append(name if name not in unique else next(copy for copy in copies if copy not in unique))
    return tuple(unique)


def find_reward(spec: str, table: Mapping[str, Reward], as_main: bool = False) -> Reward:
    """The function that ``spec`` names.

    Args:
        spec: a name in ``table``, ``module:function``, or ``path/file.py:function`` (relative to the working
            directory).
        table: the built-in rewards by name.
        as_main: make a file's module the main one, as ``find_function`` does.

    Raises:
        ValueError: no such built-in, module, file or function, or the module does not import.
    """
    place, colon, _ = spec.rpartition(":")
    if not colon:
        if spec not in table:
            raise ValueError(
                f"reward {spec!r}: no built-in of that name{nearest(spec, table)}; use one of "
                f"{', '.join(sorted(table))}, or module:function, or path/file.py:function"
            )
        return table[spec]
    if place == "__main__":
        raise ValueError(
            f"reward {spec!r}: the running script is not run again in the worker; "
            "put the function into a file of its own, or give Trainer the function itself"
        )
    return find_function(spec, "reward", as_main)


def bind(function: Reward, options: Mapping[str, Any], name: str) -> Reward:
    """``function`` with ``options`` bound as keywords; they win over a dataset's columns of the same name.

    Args:
        function: any reward.
        options: by parameter.
        name: of the reward in its run, for errors.

    Raises:
        ValueError: an option that is no parameter of the function, or no text where it says text, by its dotted path.
    """
    if not options:
        return function
    signature = inspect.signature(function)
    known = [key for key in _named(signature) if key not in RESERVED]
    for option in options:
        if option not in known:
            raise ValueError(
                f"reward.options.{name}.{option}: {reward_name(function)} has no parameter of that name"
                f"{nearest(option, known)}; it has {', '.join(known) or 'none'}"
            )

    fitting = {key: _fitting(value, signature.parameters[key], f"{name}.{key}") for key, value in options.items()}

    @functools.wraps(function)
    def bound(*samples: Any, **columns: Any) -> Any:
        return function(*samples, **{**columns, **fitting})

    free = [parameter for key, parameter in signature.parameters.items() if key not in options]
    vars(bound)["__signature__"] = signature.replace(parameters=free)
    return bound


def _fitting(value: Any, parameter: inspect.Parameter, path: str) -> Any:
    """The option as its parameter takes it: a text of digits, which a command cannot tell from a number, is text."""
    said = parameter.annotation
    if not (said in (str, "str") or (said is parameter.empty and isinstance(parameter.default, str))):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        raise ValueError(
            f"reward.options.{path}: got {value!r}, a number whose spelling is lost, and the function takes text; put "
            "it in quotes, on a command line in quotes within quotes"
        )
    return str(value) if isinstance(value, int) else value


def parameters(function: Reward) -> frozenset[str] | None:
    """Names of the keywords that ``function`` takes; None where it takes any (``**columns``), or does not say."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return None if inspect.Parameter.VAR_KEYWORD in kinds else frozenset(_named(signature))


def needed_columns(function: Reward) -> tuple[str, ...]:
    """Parameters without a default that only a dataset's column can fill.

    >>> def f(completions, answer, *, level=1, log_metric, **columns): ...
    >>> needed_columns(f)
    ('answer',)
    """
    try:
        named = _named(inspect.signature(function))
    except (TypeError, ValueError):
        return ()
    return tuple(key for key, p in named.items() if p.default is p.empty and key not in RESERVED)


def defaults(function: Reward) -> dict[str, Any]:
    """The options of a function that says what they are when nobody gives them.

    >>> def f(completions, answer, *, level=1, trainer_state=None, **columns): ...
    >>> defaults(f)
    {'level': 1}
    """
    named = _named(inspect.signature(function))
    return {key: p.default for key, p in named.items() if p.default is not p.empty and key not in RESERVED}


def _named(signature: inspect.Signature) -> dict[str, inspect.Parameter]:
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: parameter for key, parameter in signature.parameters.items() if parameter.kind in by_keyword}
