"""AdamW, its schedule, and one gradient of a whole optimizer step made of microbatches (contract 5)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.config.learning import AdamWConfig
from grpo_jax.mesh import RULES
from grpo_jax.types import Params, TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics as (sum, count): they add over microbatches, updates and hosts."""


def learning_rate(config: AdamWConfig, updates: int) -> Callable[[Any], Any]:
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


def make_optimizer(config: AdamWConfig, updates: int, decay_mask: Any) -> optax.GradientTransformation:
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


class Gradient(NamedTuple):
    """Of one optimizer step.

    Attributes:
        of: float32, like the parameters.
        loss: scalar.
        sums: metrics as (sum, count).
        maxima: metrics of which the largest counts.
    """

    of: Any
    loss: jax.Array
    sums: Sums
    maxima: dict[str, jax.Array]

    def fine(self, part: Any) -> jax.Array:
        """Whether the loss and the gradient of ``part`` (one entry of ``of``, or all of it) are finite."""
        return jnp.isfinite(optax.tree.norm(part)) & jnp.isfinite(self.loss)


def accumulate(
    loss: Callable[[Params, Any], tuple[jax.Array, tuple[Sums, dict[str, jax.Array]]]],
    params: Params,
    parts: Any,
    shardings: Any,
) -> Gradient:
    """The gradient of a loss that is a sum over microbatches, one microbatch at a time.

    Args:
        loss: (parameters, microbatch) -> (scalar, (sums, maxima)).
        params: what is differentiated.
        parts: pytree of [microbatches, rows, ...].
        shardings: of the sum, like the parameters.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def add(total: Params, part: Any) -> tuple[Params, Any]:
        (value, metrics), grads = gradient(params, part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (value, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    zeros = jax.lax.with_sharding_constraint(zeros, shardings)
    grads, (losses, (sums, maxima)) = jax.lax.scan(add, zeros, parts)
    sums, maxima = jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(lambda x: x.max(0), maxima)
    return Gradient(grads, losses.sum(), sums, maxima)


def apply(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, fine: jax.Array, shardings: Any
) -> TrainState:
    """The state after an update, or as it was where ``fine`` is False; critic and reference are passed through."""
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state, state.step + 1)
    old = (state.params, state.opt_state, state.step)
    params, opt_state, step = jax.tree.map(partial(jnp.where, fine), new, old)
    return constrain(optimizer, replace(state, params=params, opt_state=opt_state, step=step), shardings)


def constrain(optimizer: optax.GradientTransformation, state: TrainState, shardings: Any) -> TrainState:
    """Shard the parameters, and every moment of the optimizer like the parameter it belongs to."""
    shard = jax.lax.with_sharding_constraint
    opt_state = optax.tree_map_params(optimizer, shard, state.opt_state, shardings)
    return replace(state, params=shard(state.params, shardings), opt_state=opt_state)


def split(batch: Any, rows: int | None, mesh: Mesh) -> Any:
    """[N, ...] -> [microbatches, rows, ...], each part drawn from every device's rows; ``rows`` None is all of them."""
    sharding = NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))

    def cut(x: jax.Array) -> jax.Array:
        parts = x.reshape(rows or x.shape[0], -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, sharding)

    return jax.tree.map(cut, batch)


def join(parts: Any) -> Any:
    """Undo `split`: [microbatches, rows, ...] -> [N, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
