"""The static engine: one prefill a prompt, one compiled decode loop for all samples of all prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.mesh import fetch
from grpo_jax.models.model import Model
from grpo_jax.rollout.sampling import Sampling, row_keys, sample, split_ids, uniforms
from grpo_jax.types import Params, Prompt, Rollout


@dataclass(frozen=True)
class StaticEngine:
    """Samples all completions of a call together; a batch ends when its last row does.

    Attributes:
        model: what samples; the parameters come with each call and are never kept.
        prompt_len: length to which prompts are padded (P); None rounds the longest of a call up to a power of two.
        max_rows: rows decoded at once; longer calls are cut into batches of one shape. None is no limit.
    """

    model: Model
    prompt_len: int | None = None
    max_rows: int | None = None

    def generate(
        self, params: Params, prompts: Sequence[Prompt], *, num_samples: int, sampling: Sampling, seed: int, step: int
    ) -> Rollout:
        """Sample ``num_samples`` completions of each prompt.

        Args:
            params: parameters of ``model``.
            prompts: Q prompts.
            num_samples: G.
            sampling: what to draw from.
            seed: of the run, below 2**32.
            step: the round that samples; with seed, request id, sample index and place it addresses each uniform.

        Returns:
            N = Q * G rows of width P + max_new_tokens.

        Raises:
            ValueError: no prompt, an empty one, one longer than ``prompt_len``, or a token outside the vocabulary.
        """
        width = self._prompt_width(prompts)
        size = self._batch_size(len(prompts), num_samples)
        view = self.model.decode_view(params)
        parts = []
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            tokens, lengths = _pad([p.tokens for p in some], size, width)
            ids = split_ids([p.request_id for p in some] + [0] * (size - len(some)))
            scalars = [np.uint32(seed), np.uint32(step), np.int32(len(some))]
            out = _decode(self.model, num_samples, sampling, view, tokens, lengths, ids, *scalars)
            parts.append(_rows(tokens, lengths, fetch(out), num_samples, len(some)))
        return Rollout(*(np.concatenate(field) for field in zip(*parts, strict=True)))

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

    def _batch_size(self, prompt_count: int, num_samples: int) -> int:
        shards = self.model.compute.mesh.shape["data"] * self.model.compute.mesh.shape["fsdp"]
        size = -(-prompt_count // shards) * shards
        return size if self.max_rows is None else min(size, max(shards, self.max_rows // num_samples))


def _pad(prompts: list[tuple[int, ...]], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged ids -> ([size, width] int32, [size] int32); rows beyond the prompts hold one token and never run."""
    tokens = np.zeros((size, width), np.int32)
    lengths = np.ones(size, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return tokens, lengths


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    model: Model,
    num_samples: int,
    sampling: Sampling,
    view: Any,
    tokens: jax.Array,  # [Q, P]
    prompt_len: jax.Array,  # [Q]
    ids: jax.Array,  # [Q, 2]
    seed: jax.Array,
    step: jax.Array,
    prompt_count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Completions [N, C], their log-probs [N, C], lengths [N] and whether each stopped by itself [N]."""
    limit = sampling.max_new_tokens
    hidden, prompt_cache = model.prefill(view, tokens, prompt_len)
    keys = row_keys(seed, step, ids, num_samples)
    rows = keys.shape[0]
    stop_ids = jnp.asarray(sampling.stop_ids, jnp.int32)

    def draw(logits: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        token, logp, _ = sample(logits, uniforms(keys, length), sampling, sampling.temperature)
        return token, logp, (token[:, None] == stop_ids).any(-1)

    def record(carry: dict[str, Any], drawn: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, Any]:
        token, logp, stop = drawn
        live, at = carry["live"], jnp.minimum(carry["length"], limit - 1)
        row = jnp.arange(rows)
        return carry | {
            "token": token,
            "tokens": carry["tokens"].at[row, at].set(jnp.where(live, token, carry["tokens"][row, at])),
            "logp": carry["logp"].at[row, at].set(jnp.where(live, logp, carry["logp"][row, at])),
            "length": carry["length"] + live,
            "stopped": carry["stopped"] | (live & stop),
            "live": live & ~stop & (carry["length"] + 1 < limit),
        }

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        # The newest token is the one before ``length``: its keys and values go to that column.
        at = jnp.maximum(carry["length"] - 1, 0)
        hidden, cache = model.decode(view, prompt_cache, prompt_len, carry["cache"], at, carry["token"])
        return record(carry | {"cache": cache}, draw(model.head(view, hidden), carry["length"]))

    carry: dict[str, Any] = {
        "token": jnp.zeros(rows, jnp.int32),
        "tokens": jnp.zeros((rows, limit), jnp.int32),
        "logp": jnp.zeros((rows, limit), jnp.float32),
        "length": jnp.zeros(rows, jnp.int32),
        "stopped": jnp.zeros(rows, bool),
        "live": jnp.repeat(jnp.arange(tokens.shape[0]) < prompt_count, num_samples),
        "cache": model.init_cache(rows, limit),
    }
    first = jnp.repeat(model.head(view, hidden), num_samples, axis=0)
    carry = record(carry, draw(first, carry["length"]))
    carry = jax.lax.while_loop(lambda carry: carry["live"].any(), body, carry)
    return carry["tokens"], carry["logp"], carry["length"], carry["stopped"]


def _rows(
    prompts: np.ndarray, prompt_len: np.ndarray, out: Sequence[np.ndarray], num_samples: int, prompt_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts and completions -> the fields of a Rollout, rows from column 0, padding rows dropped."""
    tokens, logp, length, stopped = (np.asarray(x)[: prompt_count * num_samples] for x in out)
    start = np.repeat(prompt_len[:prompt_count], num_samples)
    count, limit = tokens.shape
    rows = np.zeros((count, prompts.shape[1] + limit), np.int32)
    rows[:, : prompts.shape[1]] = np.repeat(prompts[:prompt_count], num_samples, axis=0)
    logps = np.zeros(rows.shape, np.float32)
    column = start[:, None] + np.arange(limit)
    sampled = np.arange(limit) < length[:, None]
    np.put_along_axis(rows, column, np.where(sampled, tokens, 0), axis=1)
    np.put_along_axis(logps, column, np.where(sampled, logp, 0.0), axis=1)
    return rows, start, length, logps, np.where(stopped, "stop", "length")
