"""The values that pass between the parts, and the glossary of axis letters.

Q prompts · G samples per prompt · N = Q·G rows · T tokens in a row · V vocabulary · D width · L layers ·
H query heads · K key/value heads · S decode slots · C cache length.

Index t means token t: ``logp[n, t]`` is the log-probability of ``tokens[n, t]`` given what precedes it in its
segment. ``mask`` is bool and means "trained"; it comes from lengths, never from a token id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import numpy as np

Params = Any
"""An opaque pytree of arrays; only ``grpo_jax.models`` looks inside."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dataset, as the run draws it.

    Attributes:
        request_id: the dataset row and its draw in one number, the address of this prompt's randomness.
        tokens: token ids, at least one.
        text: what a reward function gets as the prompt: a string, or a list of chat messages.
        columns: every other column of the dataset's row.
    """

    request_id: int
    tokens: tuple[int, ...]
    text: str | Sequence[Mapping[str, Any]] = ""
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rollout:
    """What an engine sampled, on the host; row ``q * G + g`` is sample g of prompt q.

    Attributes:
        tokens: [N, T] int32, prompt and completion from column 0, padded on the right.
        prompt_len: [N] int32.
        completion_len: [N] int32, tokens sampled, the stop token among them.
        sampler_logp: [N, T] float32 of the tempered distribution before truncation; 0 outside completions.
        finish: [N] of "stop" or "length".
        drawn_logp: [N, T] float32 of the distribution that penalties and truncation left; None where none did.
    """

    tokens: np.ndarray
    prompt_len: np.ndarray
    completion_len: np.ndarray
    sampler_logp: np.ndarray
    finish: np.ndarray
    drawn_logp: np.ndarray | None = None

    def completion_ids(self, row: int) -> list[int]:
        """Token ids that row ``row`` sampled, its stop token included."""
        start = int(self.prompt_len[row])
        return [int(t) for t in self.tokens[row, start : start + int(self.completion_len[row])]]

    def take(self, rows: Any) -> "Rollout":
        """The rows that a slice or an array of indices picks."""
        columns = [(each.name, getattr(self, each.name)) for each in fields(self)]
        taken: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns}
        return Rollout(**taken)

    @staticmethod
    def join(rollouts: "Sequence[Rollout]") -> "Rollout":
        """Rollouts of one width, one behind the other."""
        columns = [(each.name, [getattr(rollout, each.name) for rollout in rollouts]) for each in fields(Rollout)]
        joined: dict[str, Any] = {name: None if x[0] is None else np.concatenate(x) for name, x in columns}
        return Rollout(**joined)

    @property
    def completion_mask(self) -> np.ndarray:
        """[N, T] bool: True at every sampled token."""
        column = np.arange(self.tokens.shape[1])[None, :]
        start = self.prompt_len[:, None]
        return (column >= start) & (column < start + self.completion_len[:, None])


@dataclass(frozen=True)
class Shared:
    """How every row is cut whose completions share one prompt; static, so that scores are made only where they count.

    Attributes:
        prompt_len: a row's first columns hold the prompt alone.
        block_len: columns of each of the blocks that follow. A completion lies in one block, and sees nothing outside
            it but the prompt.
    """

    prompt_len: int
    block_len: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Rows to train on, whatever their kind (padded, packed or group).

    Attributes:
        tokens: [N, T] int32.
        positions: [N, T] int32, place in the segment's own text; a completion goes on from its prompt.
        segment_ids: [N, T] int32, unique within a row; 0 is padding.
        context_ids: [N, T] int32 or None; the segment a token also attends to (a shared prompt), 0 for none.
        source: [N, T] int32, the column whose hidden state scores token t (t - 1, or the prompt's last column).
        mask: [N, T] bool, True where trained.
        advantages: [N, T] float32.
        sampler_logp: [N, T] float32.
        sample_ids: [N, T] int32 or None: the completion of the update that a token is of, whatever row it lies in; -1
            for no completion. Tokens that are not trained have theirs too.
        places: [N, T] int32 or None: a token's place in its completion, from 0.
        old_logp: [N, T] float32 or None: by the learner before the update.
        ref_logp: [N, T] float32 or None: by the frozen reference.
        old_values: [N, T] float32 or None: the critic's value before each token, from before the first update.
        returns: [N, T] float32 or None: what the value is to become; NaN where the completion was not scored.
        shared: how group rows are cut, static; None for the others.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    context_ids: jax.Array | None
    source: jax.Array
    mask: jax.Array
    advantages: jax.Array
    sampler_logp: jax.Array
    sample_ids: jax.Array | None = None
    places: jax.Array | None = None
    old_logp: jax.Array | None = None
    ref_logp: jax.Array | None = None
    old_values: jax.Array | None = None
    returns: jax.Array | None = None
    shared: Shared | None = field(default=None, metadata={"static": True})

    @property
    def rows(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Shared | None]:
        """What ``Model.hidden`` takes: tokens, positions, segment_ids, context_ids, shared."""
        return self.tokens, self.positions, self.segment_ids, self.context_ids, self.shared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything the update changes.

    Attributes:
        params: the policy.
        opt_state: Optax state, sharded like the parameters it belongs to.
        step: scalar int32, optimizer updates applied.
        critic: of the critic, its parameters a head [D] and, unless it shares the policy's, a trunk; None without.
        reference: a reference that follows the policy; None where it stays what the run started from.
        frozen: the base's parameters where adapters are trained, and ``params`` are those alone; None without.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    critic: "TrainState | None" = None
    reference: Params | None = None
    frozen: Params | None = None
