"""The engine: what it is built for, what it refuses, and its two calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo_jax.models.model import Model, View
from grpo_jax.rollout.decoding import Decoding, Watch
from grpo_jax.rollout.programs import Programs
from grpo_jax.rollout.requests import requests
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.shapes import Ladder, ladder
from grpo_jax.rollout.slots import row_shards
from grpo_jax.types import Params, Prompt, Rollout

PROGRAMS: dict[tuple[Model, Sampling, Ladder, int], Programs] = {}
"""Of the kinds of calls that came last: engines of one model share what is compiled."""
MOST_KINDS = 16
"""Kinds of calls whose programs are kept: each program holds memory, and some of the maps that Linux allows."""


@dataclass(frozen=True)
class ContinuousEngine:
    """Samples rows in slots: finished rows leave, the others close up or make place for those that wait.

    Attributes:
        model: what samples; the parameters come with each call and are never kept.
        prompt_len: length to which prompts are padded (P); None rounds the longest of a call up to a power of two.
        slots: most rows alive at once; None is no limit. More wait in a queue.
        refill: True starts with a queue even where all rows fit; None only where they do not.
        decode: token ids to text, for stop strings.
        ahead: with the first call of a kind begin to compile all that its like may run, beside it; `wait` ends that.
    """

    model: Model
    prompt_len: int | None = None
    slots: int | None = None
    refill: bool | None = None
    decode: Callable[[list[int]], str] | None = None
    ahead: bool = False
    _kinds: set[tuple[Model, Sampling, Ladder, int]] = field(default_factory=set, init=False, repr=False, compare=False)

    def generate(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        step: int,
        seeds: Sequence[int] | None = None,
        limits: Sequence[int] | np.ndarray | None = None,
    ) -> Rollout:
        """Sample ``num_samples`` completions of each prompt.

        Args:
            params: parameters of ``model``, or their `view`, made once for several calls.
            prompts: Q prompts.
            num_samples: G.
            sampling: what to draw from.
            seed: of the run, below 2**32.
            step: the round that samples; with seed, request id, sample index and place it addresses each uniform.
            seeds: one a prompt, instead of ``seed``.
            limits: one a row, tokens it may have; None is ``sampling.max_new_tokens`` for each.

        Returns:
            N = Q * G rows of width P + max_new_tokens.

        Raises:
            ValueError: no prompt, an empty one, one longer than ``prompt_len``, a token outside the vocabulary, or a
                model whose log-probabilities are not finite.
        """
        call = self.stream(
            params,
            prompts,
            num_samples=num_samples,
            sampling=sampling,
            seed=seed,
            step=step,
            seeds=seeds,
            limits=limits,
        )
        for _ in call:
            pass
        call.sampled.check()
        return call.sampled.rollout(np.arange(len(prompts) * num_samples))

    def stream(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        num_samples: int,
        sampling: Sampling,
        seed: int,
        step: int,
        seeds: Sequence[int] | None = None,
        limits: Sequence[int] | np.ndarray | None = None,
        watch: Watch | None = None,
    ) -> Decoding:
        """As `generate`, but an iterator over groups, each when its last row is done; others decode meanwhile.

        ``watch(row, tokens so far, done)`` is called for each row after each segment of steps.
        """
        width = self._prompt_width(prompts)
        sampling.check(self.model.spec.vocab)
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}; at least 1 completion a prompt must be sampled.")
        asked = requests(prompts, num_samples, width, sampling.max_new_tokens, seed, seeds, limits)
        shapes = self.shapes(len(prompts), num_samples, sampling.max_new_tokens)
        view = params if isinstance(params, View) else self.view(params)
        compiled = self._compiled(sampling.rules, shapes, width, view)
        return Decoding(compiled, view, shapes, asked, sampling, step, self.decode, watch)

    def view(self, params: Params) -> View:
        """A second copy of the parameters, the one that decodes; it lives as long as the caller holds it."""
        return self.model.decode_view(params)

    def _compiled(self, rules: Sampling, shapes: Ladder, width: int, view: View) -> Programs:
        key = (self.model, rules, shapes, width)
        programs = PROGRAMS.pop(key) if key in PROGRAMS else Programs(*key, view)
        PROGRAMS[key] = programs  # the newest last
        self._kinds.add(key)
        while len(PROGRAMS) > MOST_KINDS:
            del PROGRAMS[next(iter(PROGRAMS))]
        if self.ahead:
            programs.prepare()
        return programs

    def wait(self) -> None:
        """Until everything is compiled that this engine's kinds of calls so far may run; raises what failed."""
        for key, programs in list(PROGRAMS.items()):
            if self.ahead and key in self._kinds:  # another's may never compile, as where its memory did not suffice
                programs.wait()

    def shapes(self, prompts: int, num_samples: int, max_new_tokens: int) -> Ladder:
        """The shapes that such a call may decode in."""
        return ladder(prompts, num_samples, max_new_tokens, self.slots, row_shards(self.model), self.refill)

    def _prompt_width(self, prompts: Sequence[Prompt]) -> int:
        if not prompts:
            raise ValueError("prompts: got none; there is nothing to complete. Give at least one list of token ids.")
        for i, prompt in enumerate(prompts):
            if not prompt.tokens:
                raise ValueError(f"prompts[{i}]: got no token; the first one needs something to follow. Add a token.")
            if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < self.model.spec.vocab:
                raise ValueError(
                    f"prompts[{i}]: got ids from {min(prompt.tokens)} to {max(prompt.tokens)}, and the model knows "
                    f"0 to {self.model.spec.vocab - 1}. Use this model's tokenizer."
                )
        longest = max(len(p.tokens) for p in prompts)
        if self.prompt_len is None:
            return max(16, 1 << (longest - 1).bit_length())
        if longest > self.prompt_len:
            raise ValueError(f"prompts: the longest has {longest} tokens, the engine was built for {self.prompt_len}.")
        return self.prompt_len
