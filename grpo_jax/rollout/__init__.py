"""Sampling completions: the protocol every engine keeps, and `generate` for use alone."""

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from grpo_jax.models.model import Model, View
from grpo_jax.rollout.decoding import Group
from grpo_jax.rollout.engine import ContinuousEngine
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.setup import engine_from, sampling_from
from grpo_jax.types import Params, Prompt, Rollout

__all__ = ["ContinuousEngine", "Engine", "Group", "Sampling", "engine_from", "generate", "room_for", "sampling_from"]

USUAL_ROOM = 256
"""Tokens of a completion where nobody says how many."""


class Engine(Protocol):
    """What samples. Its uniforms are addressed by (seed, step, request id, sample, place), never consumed.

    Where it takes parameters it takes their `view` as well: who calls it several times makes that once.
    """

    def view(self, params: Params) -> View:
        """A copy of the parameters as they decode."""
        ...

    def generate(
        self, params: Params, prompts: Sequence[Prompt], *, num_samples: int, sampling: Sampling, seed: int, step: int
    ) -> Rollout:
        """Sample ``num_samples`` completions of each prompt, rows in the order of the prompts."""
        ...

    def stream(
        self, params: Params, prompts: Sequence[Prompt], *, num_samples: int, sampling: Sampling, seed: int, step: int
    ) -> Iterable[Group]:
        """The same by prompt, each group when it is done, while others decode."""
        ...


def room_for(model: Model, prompt_len: int, asked: int | None = None) -> int:
    """Tokens that completions may have behind prompts of at most ``prompt_len``.

    Args:
        model: has so many positions.
        prompt_len: of the longest prompt.
        asked: how many; None takes what there is room for, up to ``USUAL_ROOM``.

    Raises:
        ValueError: more than there is room for.
    """
    room = model.spec.max_len - prompt_len
    if room < 1:
        raise ValueError(
            f"prompts: got one of {prompt_len} tokens, and the {model.spec.max_len} positions the model was made for "
            "leave no room for a completion. Shorten it."
        )
    if asked is not None and room < asked:
        raise ValueError(
            f"max_new_tokens: got {asked}, with prompts of up to {prompt_len} tokens more than the "
            f"{model.spec.max_len} positions the model was made for. Lower it, or shorten the prompts."
        )
    return min(room, USUAL_ROOM) if asked is None else asked


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    num_samples: int = 8,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    min_tokens: int = 0,
    banned_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> Rollout:
    """Sample completions of prompts given as token ids.

    Args:
        model: from `load_model`.
        params: its parameters.
        prompts: Q lists of token ids, none empty.
        num_samples: completions of each prompt (G).
        max_new_tokens: longest completion, its stop token included.
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k most likely tokens.
        top_p: sample among the fewest tokens that hold this probability.
        stop_ids: tokens that end a completion; None takes those of the checkpoint's config files.
        seed: with the request ids it fixes every completion, whatever else is in the call.
        request_ids: one number a prompt that addresses its randomness; None numbers them from 0.
        seeds: one a prompt, instead of ``seed``.
        min_p, repetition_penalty, presence_penalty, min_tokens, banned_ids, stop_strings: see `Sampling`.
        decode: token ids to text, as a tokenizer does; needed for ``stop_strings``.

    Returns:
        Rollout of N = Q * G rows; ``sampler_logp`` is that of the tempered distribution before penalties and
        truncation.

    Raises:
        ValueError: an empty or missing prompt, a token outside the vocabulary, more tokens than the model has
            positions, an illegal option, a model whose log-probabilities are not finite.
    """
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("seed", seed)):
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}: got {value!r}; use a whole number.")
    ids = range(len(prompts)) if request_ids is None else request_ids
    if len(ids) != len(prompts):
        raise ValueError(f"request_ids: got {len(ids)} for {len(prompts)} prompts. Give one a prompt.")
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}; at least 1 completion a prompt must be sampled.")
    stops = model.spec.stop_ids if stop_ids is None else stop_ids
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(sorted(set(stops))),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        min_tokens=min_tokens,
        banned_ids=tuple(banned_ids),
        stop_strings=tuple(stop_strings),
    )
    asked = [Prompt(int(i), _token_ids(tokens)) for i, tokens in zip(ids, prompts, strict=True)]
    room_for(model, max((len(tokens) for tokens in prompts), default=0), max_new_tokens)
    return ContinuousEngine(model, decode=decode).generate(
        params, asked, num_samples=num_samples, sampling=sampling, seed=seed, step=0, seeds=seeds
    )


def _token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        raise ValueError(f"prompts: got the text {prompt!r}, and token ids are needed. Encode it with the tokenizer.")
    if not isinstance(prompt, Iterable) or not all(isinstance(token, numbers.Integral) for token in prompt):
        raise ValueError(f"prompts: got {prompt!r} where a list of token ids is needed. Give one a prompt.")
    return tuple(int(token) for token in prompt)
