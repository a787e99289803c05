"""The learner: the optimizer, the log-probabilities of a batch, and one jitted, donated update.

An update sees its whole optimizer step: denominators are counted over it before the first microbatch, so that
microbatches, padding, packing and meshes change memory and time, never the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import algo
from grpo_jax.algo.spec import LossConfig
from grpo_jax.config import OptimConfig
from grpo_jax.mesh import RULES
from grpo_jax.models.model import Model
from grpo_jax.types import Params, TrainBatch, TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics as (sum, count): they add over microbatches, updates and hosts."""


def learning_rate(config: OptimConfig, updates: int) -> Callable[[Any], Any]:
    """The schedule: update count -> learning rate, over ``updates`` updates."""
    after = max(updates - config.warmup_steps, 1)
    peak = config.learning_rate
    course = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return course
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, course], [config.warmup_steps])


def make_optimizer(config: OptimConfig, updates: int, decay_mask: Any) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW.

    Args:
        config: the optimizer's table.
        updates: optimizer updates of the whole run.
        decay_mask: pytree of bools like the parameters, True where weight decay applies.
    """
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    adamw = optax.adamw(
        learning_rate(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)


@dataclass(frozen=True, eq=False)
class Learner:
    """The jitted functions of one run; static in jit, one instance a run.

    Attributes:
        model: whose parameters are trained.
        loss: what is minimised.
        optimizer: from `make_optimizer`.
        schedule: update count -> learning rate, for the metrics.
        scored_len: most trained tokens a row can have (S); only their hidden states meet the vocabulary.
        temperature: of the sampler, so that all log-probabilities are of one distribution.
        microbatch_rows: rows whose activations are alive at once; it divides their number. None: all of them.
        segmented: rows hold several sequences.
    """

    model: Model
    loss: LossConfig
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    scored_len: int
    temperature: float = 1.0
    microbatch_rows: int | None = None
    segmented: bool = False

    @partial(jax.jit, static_argnums=0)
    def init(self, params: Params) -> TrainState:
        """The state before the first update; the optimizer's is sharded like the parameters."""
        return self._constrain(TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32)))

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, params: Params, batch: TrainBatch) -> jax.Array:
        """Log-probabilities of the trained tokens under ``params``.

        Returns:
            [N, T] float32, 0 where not trained.
        """
        return _join(jax.lax.map(lambda part: self._score(params, part)[0], self._split(batch)))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(self, state: TrainState, batch: TrainBatch, sequences: jax.Array) -> tuple[TrainState, Sums, dict]:
        """One optimizer update; nothing changes when nothing is trained or the gradient is not finite.

        Args:
            state: donated.
            batch: N rows of T tokens; without ``old_logp`` the batch is trained on the weights that sampled it.
            sequences: scalar int32, completions sampled for this update, the empty and filtered ones among them.

        Returns:
            (state, sums, maxima): sums are (sum, count), maxima scalars.
        """
        segments = batch.segment_ids if self.segmented else None
        denominators = algo.denominators(self.loss, batch.mask, segments=segments, sequences=sequences)
        gradient = jax.value_and_grad(partial(self._loss, denominators=denominators), has_aux=True)

        def accumulate(total: Params, part: TrainBatch) -> tuple[Params, Any]:
            (loss, metrics), grads = gradient(state.params, part)
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (loss, metrics)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        zeros = jax.lax.with_sharding_constraint(zeros, self.model.param_shardings)
        grads, (losses, (sums, maxima)) = jax.lax.scan(accumulate, zeros, self._split(batch))
        norm = optax.tree.norm(grads)
        fine = jnp.isfinite(norm) & jnp.isfinite(losses.sum()) & (denominators.tokens > 0)
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        one = jnp.ones((), jnp.float32)
        sums |= {
            "grad_norm": (norm, one),
            "learning_rate": (jnp.asarray(self.schedule(state.step), jnp.float32), one),
            "skipped_update_count": (1.0 - fine, jnp.zeros((), jnp.float32)),
        }
        return self._apply(state, grads, fine), sums, jax.tree.map(lambda x: x.max(0), maxima)

    def _apply(self, state: TrainState, grads: Params, fine: jax.Array) -> TrainState:
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        return self._constrain(jax.tree.map(partial(jnp.where, fine), new, state))

    def _constrain(self, state: TrainState) -> TrainState:
        """Shard the parameters, and every moment of the optimizer like the parameter it belongs to."""
        shard, shardings = jax.lax.with_sharding_constraint, self.model.param_shardings
        opt_state = optax.tree_map_params(self.optimizer, shard, state.opt_state, shardings)
        return replace(state, params=shard(state.params, shardings), opt_state=opt_state)

    def _loss(self, params: Params, batch: TrainBatch, denominators: Any) -> tuple[jax.Array, tuple[Sums, dict]]:
        logp, entropy = self._score(params, batch)
        old_logp = jax.lax.stop_gradient(logp) if batch.old_logp is None else batch.old_logp
        loss, sums = algo.policy_loss(
            logp,
            old_logp,
            batch.advantages,
            batch.mask,
            config=self.loss,
            ref_logp=batch.ref_logp,
            sampler_logp=batch.sampler_logp,
            entropy=entropy,
            segments=batch.segment_ids if self.segmented else None,
            denominators=denominators,
        )
        gap = jnp.where(batch.mask, jnp.abs(old_logp - batch.sampler_logp), 0.0)
        count = batch.mask.sum().astype(jnp.float32)
        sums = sums | {"sampler_logp_difference/mean": (gap.sum(), count)}
        return loss, (sums, {"sampler_logp_difference/max": gap.max()})

    def _score(self, params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy [N, T] of the trained tokens, 0 elsewhere; only they meet the vocabulary."""
        rows, width = batch.tokens.shape
        scored = min(self.scored_len, width)
        hidden = self.model.hidden(params, batch.tokens, batch.positions, batch.segment_ids, batch.context_ids)
        column = jnp.argsort(~batch.mask, axis=1, stable=True)[:, :scored]  # [N, S], the trained columns first
        trained = jnp.take_along_axis(batch.mask, column, axis=1)
        source = jnp.take_along_axis(batch.source, column, axis=1)
        hidden = jnp.take_along_axis(hidden, source[:, :, None], axis=1)  # [N, S, D]
        target = jnp.take_along_axis(batch.tokens, column, axis=1)
        logp, entropy = algo.logprobs_and_entropy(
            hidden.reshape(rows * scored, -1),
            self.model.unembedding(params),
            target.reshape(-1),
            transposed=True,
            temperature=self.temperature,
            softcap=self.model.softcap,
            logit_scale=self.model.logit_scale,
            precision=self.model.precision,
        )

        assert entropy is not None

        def place(values: jax.Array) -> jax.Array:
            kept = jnp.where(trained, values.reshape(rows, scored), 0.0)
            return jnp.zeros((rows, width), kept.dtype).at[jnp.arange(rows)[:, None], column].set(kept)

        return place(logp), place(entropy)

    def _split(self, batch: TrainBatch) -> TrainBatch:
        """[N, ...] -> [microbatches, rows, ...], each part drawn from every device's rows."""
        rows = self.microbatch_rows or batch.tokens.shape[0]

        sharding = NamedSharding(self.model.compute.mesh, PartitionSpec(None, RULES["batch"]))

        def cut(x: jax.Array) -> jax.Array:
            parts = x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(parts, sharding)

        return jax.tree.map(cut, batch)


def _join(parts: jax.Array) -> jax.Array:
    """Undo `Learner._split`: [microbatches, N / microbatches, T] -> [N, T]."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
