"""Rewards: plain Python functions ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

Every argument arrives by keyword; columns of the dataset arrive as lists, one value per completion. None (or NaN)
means "no answer". A function may be ``async def``. Built-ins are in ``REWARDS``; ``resolve`` finds them and the
user's own by name; ``RewardPool`` runs them, those given by name in worker processes under a time and a memory
limit. Nothing here imports jax, and importing this package imports only the standard library. docs/rewards.md is the
guide.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_jax.rewards.answer_format import answer_format
from grpo_jax.rewards.boxed import boxed
from grpo_jax.rewards.cosine_length import cosine_length
from grpo_jax.rewards.countdown import countdown
from grpo_jax.rewards.exact_match import exact_match
from grpo_jax.rewards.gsm8k import gsm8k
from grpo_jax.rewards.lookup import Reward, bind, defaults, find_reward, reward_name
from grpo_jax.rewards.math_verify import math_verify
from grpo_jax.rewards.quickstart import quickstart
from grpo_jax.rewards.regex import regex
from grpo_jax.rewards.repetition_penalty import repetition_penalty
from grpo_jax.rewards.soft_overlong import soft_overlong
from grpo_jax.rewards.state import TrainerState
from grpo_jax.rewards.think_format import think_format

if TYPE_CHECKING:
    from grpo_jax.rewards.pool import RewardPool, Scores

REWARDS: dict[str, Reward] = {
    function.__name__: function
    for function in (
        exact_match,
        gsm8k,
        boxed,
        math_verify,
        countdown,
        think_format,
        answer_format,
        regex,
        cosine_length,
        repetition_penalty,
        soft_overlong,
        quickstart,
    )
}
"""The built-in rewards by name."""

__all__ = ["REWARDS", "Reward", "RewardPool", "Scores", "TrainerState", "resolve", "reward_name", *REWARDS]


def resolve(spec: str, /, **options: Any) -> Reward:
    """The reward function that ``spec`` names, with ``options`` bound as keyword arguments of every call.

    ``spec`` is a name in ``REWARDS``, ``module:function``, or ``path/file.py:function``.

    Raises:
        ValueError: nothing of that name, with the names there are; or an option that the function does not have.

    >>> overlong = resolve("soft_overlong", max_completion_len=10, buffer_len=4)
    >>> overlong(prompts=[""], completions=[""], completion_ids=[[1] * 8])
    [-0.5]
    """
    return load_reward(spec, options, reward_name(spec))


def load_reward(spec: str, options: Mapping[str, Any], name: str, as_main: bool = False) -> Reward:
    """As ``resolve``, for a reward that its run calls ``name``; its file may become the main module."""
    function = find_reward(spec, REWARDS, as_main)
    # A column of the dataset may fill any parameter of a user's function, but no option of a built-in.
    own = defaults(function) if spec in REWARDS else {}
    return bind(function, {**own, **options}, name)


def __getattr__(name: str) -> Any:
    if name in ("RewardPool", "Scores"):  # they need NumPy, which a worker process does not pay for
        from grpo_jax.rewards import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
