"""What learns in a run: the parameters, their reference, and all that is done with a batch."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import algo
from grpo_jax.algo import statistics
from grpo_jax.batching import Layout, layout_for, minibatches, pack
from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.collect import Collected
from grpo_jax.config import LoraConfig, TrainConfig
from grpo_jax.functions import load_function
from grpo_jax.learner.credit import Creditor
from grpo_jax.learner.critic import Critic, critic_decay_mask
from grpo_jax.learner.dials import Controllers
from grpo_jax.learner.optimizer import learning_rate, make_optimizer
from grpo_jax.learner.step import Learner
from grpo_jax.mesh import batch_sharding
from grpo_jax.metrics import Phases, means
from grpo_jax.models import LoraSpec, Model
from grpo_jax.types import Params, TrainBatch, TrainState

MOST_SKIPPED = 10
"""Updates in a row that may be skipped for a gradient that is not finite before the run gives up."""


def adapted(model: Model, lora: LoraConfig) -> Model:
    """The model with the adapters that the config asks for, if any."""
    return model if lora.rank is None else replace(model, lora=LoraSpec(lora.rank, lora.alpha, lora.targets))


def layout_of(config: TrainConfig, model: Model, prompt_len: int) -> Layout:
    """The shapes of a run's updates; ``prompt_len`` is what prompts are padded to."""
    rollout, shards = config.rollout, model.compute.mesh.shape["data"] * model.compute.mesh.shape["fsdp"]
    layout = layout_for(
        config.batch.rows,
        prompt_len,
        rollout.max_new_tokens,
        rollout.prompts_per_step * rollout.num_samples // config.optim.minibatches,
        rollout.num_samples,
        shards,
        config.batch.row_len,
    )
    if config.optim.microbatch_rows is None:
        return layout
    # On each shard as many rows as hold so many completions, or fewer, down to half, where that leaves less padding.
    tokens = config.optim.microbatch_rows * (prompt_len + rollout.max_new_tokens)
    most = max(1, tokens // layout.row_len // shards)
    least = -(-layout.row_counts[0] // shards)
    return replace(layout, row_multiple=shards * min(range(most, most // 2, -1), key=lambda rows: -least % rows))


def _microbatch_rows(config: TrainConfig, layout: Layout) -> int | None:
    return None if config.optim.microbatch_rows is None else layout.row_multiple


def make_learner(config: TrainConfig, model: Model, layout: Layout, critic: Critic | None) -> Learner:
    """The policy's jitted functions, as the config has them."""
    updates, follow = config.steps * config.updates_per_step, config.algorithm.reference_follow
    padded = layout.kind == "padded"
    return Learner(
        model=model,
        loss=config.loss,
        optimizer=make_optimizer(config.optim, updates, model.trained(model.decay_mask)),
        schedule=learning_rate(config.optim, updates),
        scored_len=config.rollout.max_new_tokens if padded else layout.row_len,
        temperature=config.rollout.temperature,
        microbatch_rows=_microbatch_rows(config, layout),
        segmented=not padded,
        seed=config.seed,
        critic=critic if critic is not None and critic.shared else None,
        follow=None if follow.every is None else (follow.alpha, follow.every),
        router_coef=config.model.router_coef if model.spec.experts else 0.0,
    )


def make_critic(config: TrainConfig, model: Model, layout: Layout) -> Critic | None:
    """The critic's jitted functions, as the config has them; None where the advantage needs none."""
    table, updates = config.critic, config.steps * config.updates_per_step
    if not config.algorithm.has_critic:
        return None
    return Critic(
        model=model,
        optimizer=make_optimizer(table, updates, critic_decay_mask(model, table.shared_trunk)),
        schedule=learning_rate(table, updates),
        shared=table.shared_trunk,
        value_coef=table.value_coef,
        value_clip=table.value_clip,
        microbatch_rows=_microbatch_rows(config, layout),
        seed=config.seed,
    )


def check_functions(config: TrainConfig) -> None:
    """Trace the user's own advantage and surrogate on shapes alone, so that what is wrong shows before any compile.

    Raises:
        ValueError: by the dotted field, one that cannot be traced or whose result has another shape.
    """
    real: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    groups, rows = (config.rollout.prompts_per_step, config.rollout.num_samples), (2, config.rollout.max_new_tokens)
    if ":" in config.algorithm.advantage:
        own = load_function(config.algorithm.advantage)
        mask = jax.ShapeDtypeStruct(groups, jnp.bool_)
        _check("algorithm.advantage", own, groups, real(groups), mask, algo.Options(lengths=real(groups)))
    if not isinstance(config.loss.surrogate, str):
        mask = jax.ShapeDtypeStruct(rows, jnp.bool_)
        tokens = jax.eval_shape(statistics.prepare, real(rows), real(rows), real(rows), mask)
        surrogate = partial(config.loss.surrogate, config=config.loss)
        _check("algorithm.loss.surrogate", surrogate, rows, algo.Inputs(tokens, real(rows)))


def _check(field: str, function: Callable[..., Any], shape: tuple[int, ...], *arguments: Any) -> None:
    try:
        out = jax.eval_shape(function, *arguments)
    except Exception as error:
        raise ValueError(
            f"{field}: cannot be traced by jax: {type(error).__name__}: {str(error).splitlines()[0]} Use jax.numpy, "
            "and jnp.where instead of if."
        ) from error
    if getattr(out, "shape", None) != shape:
        raise ValueError(f"{field}: gives {out}, and must give one array of shape {shape}. Mend the function.")


class Learning:
    """The learner of a run and its state.

    Attributes:
        model: whose parameters are trained.
        layout: of the updates.
        learner: what updates the policy.
        critic: what values are learned with; None without gae.
        creditor: what gives advantages after the learner's passes; None where the scorer has given them.
        controllers: coefficients that move from step to step.
        state: what the update changes, the critic and a following reference among it.
        reference: the parameters the run started from; None without a KL, or where it follows the policy.
    """

    def __init__(self, config: TrainConfig, model: Model, params: Params, layout: Layout, phases: Phases):
        """Start from ``params``; nothing is compiled yet."""
        self.config, self.model, self.layout, self._phases = config, model, layout, phases
        check_functions(config)
        self.critic = make_critic(config, model, layout)
        self.learner = make_learner(config, model, layout, self.critic)
        self.creditor = None
        if config.algorithm.waits_for_learner:
            mesh = model.compute.mesh
            self.creditor = Creditor(config.algorithm, layout.sample_count, config.rollout.max_new_tokens, mesh)
        self.controllers = Controllers(config)
        self.state: TrainState = self.learner.init(params)
        if self.critic is not None:
            self.state = replace(self.state, critic=self.critic.init(params))
        self.reference: Params | None = params if config.loss.kl_coef != 0 and model.lora is None else None
        # With adapters the frozen base is the reference: no second copy.
        self._base = replace(self.learner, model=model.base) if config.loss.kl_coef != 0 and model.lora else None
        if self.learner.follow is not None:
            self.state = replace(self.state, reference=jax.tree.map(jnp.copy, params))
            self.reference = None
        self._skipped = 0

    @property
    def params(self) -> Params:
        """The policy's parameters, as they are now."""
        return self.learner.params(self.state)

    def keep_reference(self, store: CheckpointStore) -> None:
        """Write the reference, or the base under adapters, beside the checkpoints: a run begins."""
        kept = self.reference if self.state.frozen is None else self.state.frozen
        if kept is not None:
            store.save_reference(kept)

    def check_reference(self, store: CheckpointStore) -> tuple[str, ...]:
        """Lines to warn of; none where what `keep_reference` wrote, if anything, is whole.

        Raises:
            ValueError: it is damaged.
        """
        return store.check_reference() if self.reference is not None or self.state.frozen is not None else ()

    def restore(self, store: CheckpointStore, step: int) -> dict[str, Any]:
        """Go on from the checkpoint of a step; returns the rest of its record."""
        frozen = self.state.frozen
        self.state, record = store.restore(step, replace(self.state, frozen=None))
        self.controllers.restore(record["controllers"])
        if self.reference is not None:
            self.reference = store.restore_reference(self.reference)
        if frozen is not None:
            self.state = replace(self.state, frozen=store.restore_reference(frozen))
        return record

    def save(self, store: CheckpointStore, step: int, record: dict[str, Any]) -> None:
        """Write the state and the record as one checkpoint; a frozen base is written beside them, once."""
        store.save(step, replace(self.state, frozen=None), record | {"controllers": self.controllers.state()})

    def train(self, batch: Collected) -> tuple[Collected, dict[str, float]]:
        """Every update on one rollout.

        Returns:
            The batch with its advantages, and figures averaged over tokens or updates.

        Raises:
            ValueError: no gradient has been finite for `MOST_SKIPPED` steps.
        """
        with self._phases("pack"):
            parts, sequences = self._pack(batch)
        with self._phases("annotate"):
            parts = [self._annotate(part) for part in parts]
            more: dict[str, Any] = {}
            if self.creditor is not None:
                lengths, kl_coef = batch.rollout.completion_len, np.float32(self.controllers.kl_coef)
                parts, scored, more = self.creditor.assign(parts, batch.scored, lengths, kl_coef)
                batch = replace(batch, scored=scored)
        with self._phases("update"):
            figures = self._update(parts, sequences) | self.controllers.figures
            figures |= {name: float(value) for name, value in jax.device_get(more).items()}
        if figures["skipped_update_count"] < len(parts) * self.config.optim.epochs:
            self.controllers.advance(figures, int(sum(sequences)))
        return batch, figures

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
        """Add old_logp when the rollout is trained on more than once, ref_logp with a KL, old_values with a critic."""
        state = self.state
        if self.config.updates_per_step > 1:
            batch = replace(batch, old_logp=self.learner.logprobs(self.params, batch))
        reference = self.reference if state.reference is None else state.reference
        if reference is not None:
            batch = replace(batch, ref_logp=self.learner.logprobs(reference, batch))
        if self._base is not None:
            batch = replace(batch, ref_logp=self._base.logprobs(state.frozen, batch))
        if self.critic is not None and state.critic is not None:
            batch = replace(batch, old_values=self.critic.values(state.critic.params, state.params, batch))
        return batch

    def _update(self, parts: list[TrainBatch], sequences: list[np.int32]) -> dict[str, float]:
        sums, maxima = [], []
        for _ in range(self.config.optim.epochs):
            for part, count in zip(parts, sequences, strict=True):
                self.state, policy, largest = self.learner.update(self.state, part, count, self.controllers.dials)
                if self.critic is not None and not self.critic.shared:
                    critic, values = self.critic.update(self.state.critic, part)
                    self.state, policy = replace(self.state, critic=critic), policy | values
                sums.append(policy)
                maxima.append(largest)
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
