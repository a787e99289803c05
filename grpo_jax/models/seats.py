"""Which rows go on from which prompt: rows lie close together, and each prompt is read once for all of its rows."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seats:
    """B rows on R prompts, up to M of them on each.

    Where ``at`` is None every prompt has M rows, one prompt's after the other's. Otherwise numbers count within a
    shard of the rows and of the prompts: no row goes on from a prompt of another shard.

    Attributes:
        prompts: R.
        shards: parts in which rows and prompts are cut over devices.
        at: [R, M] int32, the row at each place; any row at a place that nobody has.
        block: [B] int32, the prompt of each row; any for a row that nobody has.
        place: [B] int32, the place of each row on it.
    """

    prompts: int = field(metadata={"static": True})
    shards: int = field(default=1, metadata={"static": True})
    at: Any = None
    block: Any = None
    place: Any = None

    def stack(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [R, M, ...]."""
        if self.at is None:
            return x.reshape(self.prompts, -1, *x.shape[1:])
        return self._take(x, self.at.reshape(-1)).reshape(*self.at.shape, *x.shape[1:])

    def unstack(self, x: jax.Array) -> jax.Array:
        """[R, M, ...] -> [B, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.at is None else self._take(flat, self.block * self.at.shape[1] + self.place)

    def spread(self, x: jax.Array, rows: int) -> jax.Array:
        """[R, ...] -> [B, ...], what each row's prompt has; B is ``rows``."""
        if self.at is None:
            return jnp.repeat(x, rows // self.prompts, axis=0, total_repeat_length=rows)
        return self._take(x, self.block)

    def _take(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """[n, ...] at ``index`` [m], each shard within itself."""
        take = partial(jnp.take, axis=0, mode="clip")
        if self.shards == 1:
            return take(x, index)
        parts = x.reshape(self.shards, -1, *x.shape[1:]), index.reshape(self.shards, -1)
        return jax.vmap(take)(*parts).reshape(-1, *x.shape[1:])
