"""A reward for right answers that falls, and for wrong ones that rises, with length."""

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.boxed import boxed
from grpo_jax.rewards.exact_match import exact_match
from grpo_jax.rewards.gsm8k import gsm8k
from grpo_jax.rewards.math_verify import math_verify
from grpo_jax.rewards.state import TrainerState, completion_limit

JUDGES = {"exact_match": exact_match, "gsm8k": gsm8k, "boxed": boxed, "math_verify": math_verify}
"""What may say whether an answer is right: with the options of their own left as they are."""


def cosine_length(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[Any],
    judge: str = "exact_match",
    max_completion_len: int | None = None,
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    trainer_state: TrainerState | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""From the value of a short completion to that of a long one along half a cosine, as the answer is right or wrong.

    With t = min(tokens / limit, 1): long + (short - long) * (1 + cos(pi * t)) / 2 (arXiv 2502.03373, appendix C.1).
    By default a right answer is worth more when it is short, and a wrong one less when it gave up early.

    Args:
        prompts: handed to the judge.
        completions: [N] strings or lists of messages.
        completion_ids: [N] lists of token ids, whose number is the length, the stop token among them.
        answer: [N] reference answers, as the judge reads them; a row that it does not judge gets None.
        judge: a key of ``JUDGES``: exact_match, gsm8k, boxed or math_verify.
        max_completion_len: the limit in tokens; None for the run's rollout.max_new_tokens.
        right_short: reward of a right answer of no length.
        right_long: reward of a right answer at the limit and beyond.
        wrong_short: reward of a wrong answer of no length.
        wrong_long: reward of a wrong answer at the limit and beyond.
        trainer_state: of the run.
        **columns: not looked at.

    Raises:
        ValueError: no such judge, or no limit.

    >>> said, ids = [r"\boxed{7}", r"\boxed{8}", r"\boxed{7}"], [[1] * 50, [1] * 50, [1] * 100]
    >>> cosine_length(["3+4"] * 3, said, ids, answer=["7"] * 3, max_completion_len=100)
    [0.75, -0.75, 0.5]
    """
    if judge not in JUDGES:
        raise ValueError(f"got judge = {judge!r}, which judges no answers; use one of {', '.join(JUDGES)}")
    limit = completion_limit(max_completion_len, trainer_state, "cosine_length")
    verdicts = JUDGES[judge](prompts, completions, completion_ids, answer=answer)
    rewards: list[float | None] = []
    for verdict, ids in zip(verdicts, completion_ids, strict=True):
        short, long = (right_short, right_long) if verdict == 1.0 else (wrong_short, wrong_long)
        height = (1 + math.cos(math.pi * min(len(ids) / limit, 1.0))) / 2
        rewards.append(None if verdict is None else long + (short - long) * height)
    return rewards
