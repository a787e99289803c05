"""Figures over held-out problems (docs/MATH.md, section 8). NumPy only; means over problems are the caller's."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

MOST_UNSCORED = 0.1
"""Share of the prompts that may be left out before the figures of the others mean nothing."""


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> np.ndarray:
    """The chance that at least one of k samples is right, unbiased from n samples of which c are.

    1 - prod_{i<k} max(n - c - i, 0) / (n - i): one minus the chance that k samples drawn without replacement are
    all wrong (arXiv 2107.03374, equation 1), without binomials, so nothing overflows.

    Args:
        n: [P] or a number: samples per problem.
        c: [P] or a number: right ones.
        k: at least 1, at most n.

    Returns:
        [P] float64, or a scalar array where n and c are numbers.

    Raises:
        ValueError: k outside 1 to n, or c outside 0 to n.
    """
    n, c = _counts(n, c)
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@k: got k = {k} with {n.min()} samples, but k is from 1 to the samples; draw more")
    i = np.arange(k)
    fail = np.maximum(n[..., None] - c[..., None] - i, 0) / (n[..., None] - i)
    return 1.0 - fail.prod(axis=-1)


def avg_at_k(n: ArrayLike, c: ArrayLike) -> np.ndarray:
    """The share of right samples, c / n: [P] float64, or a scalar array.

    Raises:
        ValueError: no samples, or c outside 0 to n.
    """
    n, c = _counts(n, c)
    return np.asarray(c / n)


def maj_at_k(answers: Sequence[Sequence[Hashable | None]], correct: ArrayLike) -> np.ndarray:
    """Whether the most frequent answer is right, by problem.

    Answers that are equally frequent share: right ones among t tied count 1/t each. An answer that was not parsed is
    None and never wins over a parsed one; with nothing parsed the problem counts 0. Where samples of one answer were
    judged differently, the answer counts as the share of them that was right.

    Args:
        answers: P lists of k answers.
        correct: [P, k] bool.

    Returns:
        [P] float64.

    Raises:
        ValueError: shapes that differ.
    """
    right = np.asarray(correct, dtype=bool)
    if right.ndim != 2 or right.shape[0] != len(answers) or any(len(row) != right.shape[1] for row in answers):
        raise ValueError(
            f"maj@k: got answers of {len(answers)} problems and correct of shape {right.shape}; give one flag an answer"
        )
    return np.array([_majority(row, flags) for row, flags in zip(answers, right, strict=True)], dtype=np.float64)


def bootstrap_interval(values: ArrayLike, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean over problems.

    Problems are drawn with replacement, ``draws`` times; the interval holds the middle 95 % of the means. The same
    values and seed give the same interval.

    Args:
        values: [P], one figure per problem.
        draws: at least 1.
        seed: at least 0.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    figures = np.asarray(values, dtype=np.float64)
    if figures.ndim != 1 or not figures.size or not np.isfinite(figures).all():
        raise ValueError(f"bootstrap: got values of shape {figures.shape}; it needs one finite figure per problem")
    if draws < 1:
        raise ValueError(f"bootstrap: got {draws} draws, but an interval needs at least one; use 1000")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    means = [figures[generator.integers(0, figures.size, figures.size)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdicts(rewards: ArrayLike, above: float) -> tuple[np.ndarray, np.ndarray]:
    """Which prompts are judged, and what was right of them: a sample without a reward is neither right nor wrong.

    Args:
        rewards: [P, k], NaN where a sample was not scored; a prompt with such a sample is left out.
        above: a sample is right when its reward is above this.

    Returns:
        [P] bool, the prompts whose samples were all scored, J of them; and [J, k] bool, the right samples of these.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    judged = np.isfinite(rewards).all(axis=-1)
    return judged, rewards[judged] > above


def meaningless(judged: ArrayLike, name: str) -> str | None:
    """What is to be said where so few prompts were judged that figures of the others mean nothing; None where enough.

    Args:
        judged: [P] bool, as ``verdicts`` gives it.
        name: of the reward function.
    """
    judged = np.asarray(judged)
    lost = int((~judged).sum())
    if lost <= MOST_UNSCORED * judged.size:
        return None
    return (
        f"the reward {name!r} did not score all samples of {lost} of {judged.size} prompts, which are left out: the "
        "figures of this evaluation mean nothing. Give it time (reward.timeout_seconds, for 16 completions), and see "
        "for what it says None."
    )


def _counts(n: ArrayLike, c: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if n.size and ((n < 1).any() or (c < 0).any() or (c > n).any()):
        raise ValueError(f"samples: got n = {n.tolist()} with c = {c.tolist()} right; c is from 0 to n, n at least 1")
    return n, c


def _majority(answers: Sequence[Hashable | None], right: np.ndarray) -> float:
    flags: dict[Hashable, list[bool]] = {}
    for answer, flag in zip(answers, right, strict=True):
        if answer is not None:
            flags.setdefault(answer, []).append(bool(flag))
    most = max((len(votes) for votes in flags.values()), default=0)
    winners = [sum(votes) / len(votes) for votes in flags.values() if len(votes) == most]
    return sum(winners) / len(winners) if winners else 0.0
