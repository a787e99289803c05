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

POLICY, CRITIC = 0x706F6C69, 0x63726974
"""Whose update it is, in the address of what its rounding draws."""

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
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    fine: jax.Array,
    shardings: Any,
    address: tuple[int, int],
) -> TrainState:
    """The state after an update, or as it was where ``fine`` is False; critic and reference are passed through.

    The update is computed in float32 whatever the state is kept in. What is kept in bfloat16 is rounded at random
    (`round_at_random`): at the learning rates of reinforcement learning an update is less than half a step of it, and
    rounding to the nearest would leave every parameter where it was.

    Args:
        optimizer: from `make_optimizer`.
        state: before.
        grads: float32, like the parameters.
        fine: scalar bool.
        shardings: of the parameters.
        address: the run's seed and whose update it is; with the update's number what the rounding draws from.
    """
    wide, moments = (jax.tree.map(_widen, tree) for tree in (state.params, state.opt_state))
    updates, moments = optimizer.update(jax.tree.map(_widen, grads), moments, wide)
    seed, whose = address
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), whose), state.step)
    old = (state.params, state.opt_state)
    new = round_at_random((optax.apply_updates(wide, updates), moments), old, key)
    params, opt_state, step = jax.tree.map(partial(jnp.where, fine), (*new, state.step + 1), (*old, state.step))
    return constrain(optimizer, replace(state, params=params, opt_state=opt_state, step=step), shardings)


def round_at_random(tree: Any, like: Any, key: jax.Array) -> Any:
    """Each array in the dtype of ``like``: float32 becomes bfloat16 up or down, with chances that keep its mean.

    A value that bfloat16 holds stays as it is. What is drawn for an element depends on the key, the array's place in
    the tree and the element's in the array, on no mesh.
    """
    leaves, structure = jax.tree.flatten(tree)
    words = jax.random.bits(key, (len(leaves), 2), jnp.uint32)
    rounded = map(_rounded, leaves, jax.tree.leaves(like), words)
    return jax.tree.unflatten(structure, list(rounded))


def _rounded(x: jax.Array, like: jax.Array, word: jax.Array) -> jax.Array:
    if x.dtype == like.dtype or like.dtype != jnp.bfloat16:
        return x.astype(like.dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = _hashed(x.shape, word) >> 16
    up_or_down = jax.lax.bitcast_convert_type((bits + drawn) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up_or_down, x).astype(like.dtype)  # a carry would end infinity


def _hashed(shape: tuple[int, ...], word: jax.Array) -> jax.Array:
    """32 bits an element by its place: MurmurHash3's finaliser twice, a few products where threefry takes a hundred."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mixed(_mixed(place ^ word[0]) ^ word[1])


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


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
