"""The experiment's control: rewards that have nothing to do with the completion they are given for.

In a config: ``reward.functions = ["quickstart", "grpo_jax.quickstart.controls:shuffled"]`` and
``reward.weights = [0.0, 1.0]``; the evaluation goes by the first function, the training by the second.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.quickstart import quickstart


def shuffled(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[str],
    **columns: Any,
) -> list[float | None]:
    """The quickstart's rewards of the same batch, dealt out again over all its prompts and completions.

    The order depends on the batch alone, so that a resumed run gets the same one.
    """
    scores = quickstart(prompts, completions, completion_ids, answer=answer)
    seed = hashlib.sha256("\n".join([*map(str, prompts), *map(str, completions)]).encode()).hexdigest()
    random.Random(seed).shuffle(scores)
    return scores
