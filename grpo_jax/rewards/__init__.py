"""Rewards: plain Python functions ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

Every argument arrives by keyword; columns of the dataset arrive as lists, one value per completion. None (or NaN)
means "no answer". A function may be ``async def``. Built-ins are in ``REWARDS``; ``resolve`` finds them and the
user's own by name; ``RewardPool`` runs them, those given by name in worker processes under a time and a memory
limit. Nothing here imports jax, and importing this package imports only the standard library.
"""

from typing import TYPE_CHECKING, Any

from grpo_jax.rewards.answer_format import answer_format
from grpo_jax.rewards.exact_match import exact_match
from grpo_jax.rewards.lookup import Reward, find_reward, reward_name
from grpo_jax.rewards.quickstart import quickstart
from grpo_jax.rewards.soft_overlong import soft_overlong

if TYPE_CHECKING:
    from grpo_jax.rewards.pool import RewardPool, Scores

__all__ = [
    "REWARDS",
    "Reward",
    "RewardPool",
    "Scores",
    "answer_format",
    "exact_match",
    "quickstart",
    "resolve",
    "reward_name",
    "soft_overlong",
]


def resolve(spec: str, /, **parameters: Any) -> Reward:
    """The reward function that ``spec`` names, with ``parameters`` bound as keyword arguments of every call.

    ``spec`` is a name in ``REWARDS``, ``module:function``, or ``path/file.py:function``.

    Raises:
        ValueError: nothing of that name, with the names there are; or parameters that a built-in refuses.

    >>> overlong = resolve("soft_overlong", max_completion_len=10, buffer_len=4)
    >>> overlong(prompts=[""], completions=[""], completion_ids=[[1] * 8])
    [-0.5]
    """
    function = find_reward(spec, REWARDS, parameters)
    if spec in REWARDS:
        function(prompts=[], completions=[], completion_ids=[], answer=[])  # refuses its parameters now, not mid-run
    return function


def __getattr__(name: str) -> Any:
    if name in ("RewardPool", "Scores"):  # they need NumPy, which a worker process does not pay for
        from grpo_jax.rewards import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "answer_format": answer_format,
    "quickstart": quickstart,
    "soft_overlong": soft_overlong,
}
