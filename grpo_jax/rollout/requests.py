"""What is asked of an engine in one call, and what was sampled so far: host arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.rollout.sampling import split_ids
from grpo_jax.types import Prompt, Rollout


@dataclass(frozen=True)
class Requests:
    """Q prompts with G samples each; row ``q * G + g`` is sample g of prompt q.

    Attributes:
        tokens: [Q, P] int32, padded.
        length: [Q] int32, at least 1.
        address: [N, 4] uint32 of each row, see `address_keys`.
        limit: [N] int32, tokens a row may sample.
        samples: G.
    """

    tokens: np.ndarray
    length: np.ndarray
    address: np.ndarray
    limit: np.ndarray
    samples: int

    @property
    def last(self) -> np.ndarray:
        """[Q] int32, each prompt's last token."""
        return self.tokens[np.arange(len(self.length)), self.length - 1]


def requests(
    prompts: Sequence[Prompt],
    samples: int,
    width: int,
    limit: int,
    seed: int,
    seeds: Sequence[int] | None,
    limits: Sequence[int] | np.ndarray | None,
) -> Requests:
    """Lists -> arrays.

    Args:
        prompts: Q, none longer than ``width``.
        samples: G.
        width: P.
        limit: tokens any row may sample.
        seed: of the call.
        seeds: one a prompt instead of it.
        limits: one a row, at most ``limit``; None is that for all.

    Raises:
        ValueError: lengths that do not agree, or a value out of range.
    """
    count = len(prompts)
    own = np.full(count, seed) if seeds is None else np.asarray(seeds)
    if own.shape != (count,) or (own < 0).any() or (own >= 2**32).any():
        what = f"seed: got {seed}" if seeds is None else f"seeds: got {own.tolist()} for {count} prompts, one a prompt"
        raise ValueError(f"{what}; a seed is from 0 to 2**32 - 1. Use another.")
    most = np.full(count * samples, limit) if limits is None else np.asarray(limits)
    if most.shape != (count * samples,) or (most < 1).any() or (most > limit).any():
        raise ValueError(
            f"limits: got shape {most.shape}. Give one from 1 to {limit} to each of {count * samples} rows."
        )
    tokens, length = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)], length[row] = prompt.tokens, len(prompt.tokens)
    ids = split_ids([prompt.request_id for prompt in prompts])
    address = np.zeros((count, samples, 4), np.uint32)
    address[..., 0] = own[:, None]
    address[..., 1:3], address[..., 3] = ids[:, None], np.arange(samples)
    return Requests(tokens, length, address.reshape(-1, 4), most.astype(np.int32), samples)


class Sampled:
    """Completions as they come in, row by row.

    Attributes:
        tokens: [N, C] int32.
        logp: [N, C] float32.
        drawn_logp: [N, C] float32 or None.
        length: [N] int32.
        stopped: [N] bool.
    """

    def __init__(self, asked: Requests, limit: int, changed: bool):
        """Empty."""
        rows = len(asked.limit)
        self.asked = asked
        self.tokens, self.logp = np.zeros((rows, limit), np.int32), np.zeros((rows, limit), np.float32)
        self.drawn_logp = np.zeros((rows, limit), np.float32) if changed else None
        self.length, self.stopped = np.zeros(rows, np.int32), np.zeros(rows, bool)

    def put(self, row: int, tokens: np.ndarray, logp: np.ndarray, drawn_logp: np.ndarray | None, stopped: bool) -> None:
        """Keep a finished row."""
        count = len(tokens)
        self.tokens[row, :count], self.logp[row, :count] = tokens, logp
        if self.drawn_logp is not None and drawn_logp is not None:
            self.drawn_logp[row, :count] = drawn_logp
        self.length[row], self.stopped[row] = count, stopped

    def check(self) -> None:
        """Raise ValueError where the model gave no numbers."""
        if not np.isfinite(self.logp).all():
            raise ValueError(
                "sampling: the model's log-probabilities are not finite, so what it samples means nothing. Look at its "
                "parameters, or raise the temperature if it is close to 0."
            )

    def rollout(self, rows: np.ndarray) -> Rollout:
        """Rows with their prompts from column 0, as the learner wants them; width P + C."""
        asked = self.asked
        prompt = rows // asked.samples
        start, limit = asked.length[prompt], self.tokens.shape[1]
        column, sampled = start[:, None] + np.arange(limit), np.arange(limit) < self.length[rows, None]

        def wide(values: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
            out = np.zeros((len(rows), asked.tokens.shape[1] + limit), values.dtype)
            if first is not None:
                out[:, : first.shape[1]] = first
            np.put_along_axis(out, column, np.where(sampled, values[rows], values.dtype.type(0)), axis=1)
            return out

        return Rollout(
            tokens=wide(self.tokens, asked.tokens[prompt]),
            prompt_len=start,
            completion_len=self.length[rows],
            sampler_logp=wide(self.logp),
            finish=np.where(self.stopped[rows], "stop", "length"),
            drawn_logp=None if self.drawn_logp is None else wide(self.drawn_logp),
        )
