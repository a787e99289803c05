"""What learns in a run: the parameters, their reference, and all that is done with a batch."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from grpo_jax.batching import Layout, minibatches, pack
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.collect import Collected
from grpo_jax.config import TrainConfig
from grpo_jax.mesh import batch_sharding
from grpo_jax.metrics import Phases, means
from grpo_jax.models import Model
from grpo_jax.optimizer import learning_rate, make_optimizer
from grpo_jax.step import Learner
from grpo_jax.types import Params, TrainBatch, TrainState

MOST_SKIPPED = 10
"""Updates in a row that may be skipped for a gradient that is not finite before the run gives up."""


def layout_of(config: TrainConfig, model: Model, prompt_len: int) -> Layout:
    """The shapes of a run's updates; ``prompt_len`` is what prompts are padded to."""
    rows = config.rollout.prompts_per_step * config.rollout.num_samples
    width = prompt_len + config.rollout.max_new_tokens
    row_len = width if config.batch.rows == "padded" else config.batch.row_len or 2 * width
    shards = model.compute.mesh.shape["data"] * model.compute.mesh.shape["fsdp"]
    return Layout(
        config.batch.rows,
        row_len,
        rows // config.optim.minibatches,
        _microbatch_rows(config, shards) or shards,
    )


def _microbatch_rows(config: TrainConfig, shards: int) -> int | None:
    micro = config.optim.microbatch_rows
    return None if micro is None else -(-micro // shards) * shards


class Learning:
    """The learner of a run and its state.

    Attributes:
        model: whose parameters are trained.
        layout: of the updates.
        state: what the update changes.
        reference: the parameters the run started from; None without a KL.
    """

    def __init__(self, config: TrainConfig, model: Model, params: Params, layout: Layout, phases: Phases):
        """Start from ``params``; nothing is compiled yet."""
        self.config, self.model, self.layout, self._phases = config, model, layout, phases
        updates = config.steps * config.updates_per_step
        shards = model.compute.mesh.shape["data"] * model.compute.mesh.shape["fsdp"]
        padded = layout.kind == "padded"
        self.learner = Learner(
            model=model,
            loss=config.loss,
            optimizer=make_optimizer(config.optim, updates, model.decay_mask),
            schedule=learning_rate(config.optim, updates),
            scored_len=config.rollout.max_new_tokens if padded else layout.row_len,
            temperature=config.rollout.temperature,
            microbatch_rows=_microbatch_rows(config, shards),
            segmented=not padded,
        )
        self.state: TrainState = self.learner.init(params)
        self.reference: Params | None = params if config.loss.kl_in_loss else None
        self._skipped = 0

    @property
    def params(self) -> Params:
        """The policy's parameters, as they are now."""
        return self.state.params

    def keep_reference(self, store: CheckpointStore) -> None:
        """Write the reference beside the checkpoints, once; a resumed run reads it back."""
        if self.reference is not None:
            store.save_reference(self.reference)

    def restore(self, store: CheckpointStore, step: int) -> dict[str, Any]:
        """Go on from the checkpoint of a step; returns the rest of its record."""
        self.state, record = store.restore(step, self.state)
        if self.reference is not None:
            self.reference = store.restore_reference(self.reference)
        return record

    def save(self, store: CheckpointStore, step: int, record: dict[str, Any]) -> None:
        """Write the state and the record as one checkpoint."""
        store.save(step, self.state, record)

    def train(self, batch: Collected) -> dict[str, float]:
        """Every update on one rollout; its figures, averaged over tokens or updates.

        Raises:
            ValueError: no gradient has been finite for `MOST_SKIPPED` steps.
        """
        with self._phases("pack"):
            parts, sequences = self._pack(batch)
        with self._phases("annotate"):
            parts = [self._annotate(part) for part in parts]
        with self._phases("update"):
            return self._update(parts, sequences)

    def _pack(self, batch: Collected) -> tuple[list[TrainBatch], list[np.int32]]:
        """Rows of each update of one epoch, on the devices, and the completions each counts."""
        samples = self.config.rollout.num_samples
        counted = np.repeat(batch.scored.counted, samples)
        parts, sequences = [], []
        for rows in minibatches(batch.rollout, self.config.optim.minibatches):
            scored = batch.scored
            part = pack(batch.rollout.take(rows), scored.advantages[rows], scored.mask[rows], self.layout)
            parts.append(jax.device_put(part, batch_sharding(self.model.compute.mesh)))
            sequences.append(np.int32(counted[rows].sum()))
        return parts, sequences

    def _annotate(self, batch: TrainBatch) -> TrainBatch:
        """Add old_logp when the rollout is trained on more than once, ref_logp when there is a KL."""
        if self.config.updates_per_step > 1:
            batch = replace(batch, old_logp=self.learner.logprobs(self.state.params, batch))
        if self.reference is not None:
            batch = replace(batch, ref_logp=self.learner.logprobs(self.reference, batch))
        return batch

    def _update(self, parts: list[TrainBatch], sequences: list[np.int32]) -> dict[str, float]:
        sums, maxima = [], []
        for _ in range(self.config.optim.epochs):
            for part, count in zip(parts, sequences, strict=True):
                self.state, *figures = self.learner.update(self.state, part, count)
                sums.append(figures[0])
                maxima.append(figures[1])
        sums, maxima = jax.device_get((sums, maxima))
        out = means(sums) | {name: float(np.max([m[name] for m in maxima])) for name in maxima[0]}
        out["batch/row_count"] = sum(part.tokens.shape[0] for part in parts)
        self._skipped = self._skipped + 1 if out["skipped_update_count"] == len(sums) else 0
        if self._skipped > MOST_SKIPPED and not np.isfinite(out["grad_norm"]):
            raise ValueError(
                f"the gradient was not finite in {self._skipped} steps in a row, so nothing is learned any more. "
                "Lower optim.learning_rate, or compute in float32 (model.dtype)."
            )
        return out
