"""The compiled programs of an engine, all listed from its shapes, and compiled side by side before they are needed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.mesh import spec_for
from grpo_jax.models.model import Model, View
from grpo_jax.rollout import slots as at
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.shapes import Ladder, Shape
from grpo_jax.rollout.slots import Context, Rows, Seating, Slots

Key = tuple[Any, ...]
Struct = jax.ShapeDtypeStruct


class Programs:
    """Every program that calls of one kind may run.

    Attributes:
        keys: what may be compiled, in the order in which a call needs it.
    """

    def __init__(self, model: Model, rules: Sampling, shapes: Ladder, width: int, view: View):
        """Nothing is compiled yet.

        Args:
            model: static.
            rules: static.
            shapes: of the rows.
            width: P, length to which prompts are padded.
            view: parameters of the shapes and places that calls will have; not kept.
        """
        self._view = jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=x.sharding), view)
        self._model, self._rules, self._ladder, self._width = model, rules, shapes, width
        self._compiled: dict[Key, Any] = {}
        first = shapes.first
        keys: list[Key] = [("prefill",), ("open", first)]
        if first.rows // first.group != shapes.pool:
            keys.append(("seat", first))
        keys += [("segment", shape) for shape in shapes.shapes]
        for move in shapes.moves:
            keys += [("rows", *move)] + [("layer", *move, kind) for kind in self._layer_kinds]
        self.keys = tuple(keys)

    def prepare(self) -> None:
        """Compile what is not compiled yet, several at a time."""
        missing = [key for key in self.keys if key not in self._compiled]
        if missing:
            lowered = [self._lower(key) for key in missing]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
                self._compiled.update(zip(missing, workers.map(lambda x: x.compile(), lowered), strict=True))

    def __call__(self, *key: Any) -> Any:
        """The program of a key, compiled now if it is not yet.

        Raises:
            ValueError: one that is not listed (contract 8).
        """
        if key not in self._compiled:
            if key not in self.keys:
                raise ValueError(f"rollout: {key} is none of the shapes that were listed before the run; report this")
            self._compiled[key] = self._lower(key).compile()
        return self._compiled[key]

    @property
    def _layer_kinds(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys((layer.kv_heads, layer.head_dim) for layer in self._model.spec.layers))

    def _lower(self, key: Key) -> Any:
        table: dict[str, Callable[..., Any]] = {
            "prefill": self._lower_prefill,
            "open": self._lower_open,
            "seat": self._lower_seat,
            "segment": self._lower_segment,
            "rows": self._lower_rows,
            "layer": self._lower_layer,
        }
        return table[key[0]](*key[1:])

    def _lower_prefill(self) -> Any:
        tokens, length = self._plain(self._ladder.pool, self._width), self._plain(self._ladder.pool)
        return at.prefill.lower(self._model, self._view, tokens, length)

    def _lower_open(self, shape: Shape) -> Any:
        return at.open_slots.lower(self._model, shape, self._rules, self._seating(shape))

    def _lower_seat(self, shape: Shape) -> Any:
        index = self._plain(shape.rows // shape.group)
        return at.seat_context.lower(self._model, self._context(self._ladder.pool), index)

    def _lower_segment(self, shape: Shape) -> Any:
        context, slots = self._context(shape.rows // shape.group), self._slots(shape)
        live, number = self._plain(shape.rows, dtype=bool), self._plain()
        temperature = self._plain(dtype=jnp.float32)
        return at.segment.lower(self._model, self._rules, self._view, context, slots, live, temperature, number, number)

    def _lower_rows(self, source: Shape, target: Shape, contexts: int) -> Any:
        small = [(each.length, each.tokens) for each in self._contexts(source, contexts)]
        rows = self._slots(source).rows
        return at.move_rows.lower(self._model, target.length, rows, small, self._seating(target))

    def _lower_layer(self, source: Shape, target: Shape, contexts: int, kind: tuple[int, int]) -> Any:
        place = next(i for i, x in enumerate(self._model.spec.layers) if (x.kv_heads, x.head_dim) == kind)
        prompts = [each.cache[place] for each in self._contexts(source, contexts)]
        own = self._slots(source).cache[place]
        return at.move_layer.lower(self._model, target.length, own, prompts, self._seating(target))

    def _contexts(self, shape: Shape, count: int) -> list[Context]:
        return [self._context(size) for size in (shape.rows // shape.group, self._ladder.pool)[:count]]

    def _plain(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array of the host's, the same on every device."""
        return Struct(shape, dtype, sharding=NamedSharding(self._model.compute.mesh, PartitionSpec()))

    def _pinned(self, dtype: Any, *shape: int) -> Any:
        spec = spec_for(at.axes_of(len(shape)), shape, self._model.compute.mesh)
        return Struct(shape, dtype, sharding=NamedSharding(self._model.compute.mesh, spec))

    def _cache(self, rows: int, length: int) -> Any:
        cache = jax.eval_shape(lambda: self._model.init_cache(rows, length))
        return jax.tree.map(lambda x: self._pinned(x.dtype, *x.shape), cache)

    def _context(self, count: int) -> Context:
        small = self._pinned(jnp.int32, count), self._pinned(jnp.int32, count, self._width)
        return Context(self._cache(count, self._width), *small)

    def _slots(self, shape: Shape) -> Slots:
        count, wide = self._pinned(jnp.int32, shape.rows), partial(self._pinned, jnp.float32)
        logp = wide(shape.rows, shape.length)
        rows = Rows(
            token=count,
            length=count,
            limit=count,
            stopped=self._pinned(jnp.bool_, shape.rows),
            keys=self._pinned(jnp.uint32, shape.rows, 2),
            tokens=self._pinned(jnp.int32, shape.rows, shape.length),
            logp=logp,
            drawn_logp=logp if self._rules.changed else None,
        )
        return Slots(rows, self._cache(shape.rows, shape.length))

    def _seating(self, shape: Shape) -> Seating:
        number = self._plain(shape.rows)
        return Seating(
            source=number,
            fresh=self._plain(shape.rows, dtype=bool),
            token=number,
            limit=number,
            keys=self._plain(shape.rows, 2, dtype=jnp.uint32),
            prompt=self._plain(shape.rows // shape.group),
        )
