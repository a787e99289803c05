"""The soft overlong punishment of DAPO."""

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.state import TrainerState, completion_limit


def soft_overlong(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_len: int | None = None,
    buffer_len: int | None = None,
    factor: float = 1.0,
    trainer_state: TrainerState | None = None,
    **columns: Any,
) -> list[float | None]:
    """0 for short completions, falling linearly to -factor over the last ``buffer_len`` tokens, -factor beyond.

    The length counts tokens, the stop token among them (DAPO, arXiv 2503.14476, equation 13; docs/MATH.md,
    section 6).

    Args:
        prompts: not looked at.
        completions: not looked at.
        completion_ids: [N] lists of token ids.
        max_completion_len: tokens a completion may have; None for the run's rollout.max_new_tokens.
        buffer_len: tokens before the limit over which the punishment grows; None for a fifth of the limit.
        factor: scale of the punishment, at least 0.
        trainer_state: of the run.
        **columns: not looked at.

    Raises:
        ValueError: no limit, or not 0 < buffer_len <= max_completion_len, or a factor that is negative or not finite.

    >>> soft_overlong([""] * 4, [""] * 4, [[1] * 80, [1] * 90, [1] * 100, [1] * 101], max_completion_len=100)
    [0.0, -0.5, -1.0, -1.0]
    """
    limit = completion_limit(max_completion_len, trainer_state, "soft_overlong")
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"got factor = {factor}, but the scale of a punishment is finite and at least 0; use 1.0")
    buffer = limit / 5 if buffer_len is None else buffer_len
    if not 0 < buffer <= limit:
        raise ValueError(
            f"got buffer_len = {buffer_len} with max_completion_len = {limit}, but the buffer is a part of the "
            "limit; use 0 < buffer_len <= max_completion_len"
        )
    over = (len(ids) - (limit - buffer) for ids in completion_ids)
    return [-factor * min(tokens / buffer, 1.0) if tokens > 0 else 0.0 for tokens in over]
