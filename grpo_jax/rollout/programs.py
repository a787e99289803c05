"""The compiled programs of an engine, all listed from its shapes, and compiled before they are needed."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.mesh import spec_for
from grpo_jax.models.model import Model, View
from grpo_jax.models.seats import Seats
from grpo_jax.rollout import slots as at
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.shapes import Ladder, Shape
from grpo_jax.rollout.slots import Context, Rows, Seating, Slots

Key = tuple[Any, ...]
Struct = jax.ShapeDtypeStruct

MOST_WORKERS = 4
"""Threads that compile: beside them the first rollout decodes."""


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
        self._made: dict[Key, Future[Any]] = {}
        self._lock, self._workers = threading.Lock(), list[threading.Thread]()
        self.keys = tuple(self._listed())

    def _listed(self) -> list[Key]:
        first = self._ladder.first
        keys: list[Key] = [("prefill",), ("open", first)]
        if not self._ladder.whole:
            keys.append(("seat", first))
        for shape in sorted(self._ladder.shapes, key=lambda shape: (shape.length, -shape.rows)):
            for move in self._ladder.moves:
                if move[1] == shape:
                    keys += [("rows", *move)] + [("layer", *move, kind) for kind in self._layer_kinds]
            keys.append(("segment", shape))
        return keys

    def prepare(self) -> None:
        """Begin to compile everything, in the order in which a call needs it, while whoever asked for it goes on.

        Several processes compile at once and in one order: what XLA tries out it may share between them.
        """
        if jax.process_count() > 1:
            self.wait()
        elif not self._workers:
            self("prefill")  # by whoever asked, so that its log of compiles shows that this kind of call is new
            names = [f"compile-{i}" for i in range(min(MOST_WORKERS, os.cpu_count() or 1))]
            self._workers = [threading.Thread(target=self._work, name=name) for name in names]
            for worker in self._workers:
                worker.start()

    def wait(self) -> None:
        """Compile what nobody else compiles, and wait for the others; raises what failed."""
        for key in self.keys:
            self(*key)

    def __call__(self, *key: Any) -> Any:
        """The program of a key, compiled now if nobody has begun to.

        Raises:
            ValueError: one that is not listed (contract 8).
        """
        if key not in self._made and key not in self.keys:
            raise ValueError(f"rollout: {key} is none of the shapes that were listed before the run; report this")
        future, mine = self._claim(key)
        if mine:
            self._make(key, future)
        return future.result()

    def _work(self) -> None:
        """Compile what nobody has begun to, until the main thread has ended: then Python waits for this one."""
        for key in self.keys:
            future, mine = self._claim(key)
            if mine and not threading.main_thread().is_alive():
                return
            if mine:
                self._make(key, future)

    def _claim(self, key: Key) -> tuple[Future[Any], bool]:
        """What will hold a program, and whether it is the caller who has to make it."""
        with self._lock:
            mine = key not in self._made
            return self._made.setdefault(key, Future()), mine

    def _make(self, key: Key, future: Future[Any]) -> None:
        """Whoever waits is told of an error; who asks later tries anew, as after Ctrl-C."""
        try:
            future.set_result(self.lower(key).compile())
        except BaseException as error:
            del self._made[key]
            future.set_exception(error)

    @property
    def _layer_kinds(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys((layer.kv_heads, layer.head_dim) for layer in self._model.spec.layers))

    def lower(self, key: Key) -> Any:
        """The program of a key, to be compiled."""
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
        index = self._plain(shape.blocks)
        return at.seat_context.lower(self._model, self._context(self._ladder.pool), index)

    def _lower_segment(self, shape: Shape) -> Any:
        context, slots = self._context(shape.blocks), self._slots(shape)
        live, number = self._plain(shape.rows, dtype=bool), self._plain()
        temperature = self._plain(dtype=jnp.float32)
        scalars = temperature, number, number
        seats = self._seats(shape)
        return at.segment.lower(self._model, self._rules, self._view, context, slots, live, seats, *scalars)

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
        return [self._context(size) for size in (shape.blocks, self._ladder.pool)[:count]]

    def _plain(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An array of the host's, the same on every device."""
        return Struct(shape, dtype, sharding=NamedSharding(self._model.compute.mesh, PartitionSpec()))

    def _pinned(self, dtype: Any, *shape: int) -> Any:
        spec = spec_for(at.axes_of(len(shape)), shape, self._model.compute.mesh)
        return Struct(shape, dtype, sharding=NamedSharding(self._model.compute.mesh, spec))

    def _cache(self, make: Callable[[int, int], Any], rows: int, length: int) -> Any:
        cache = jax.eval_shape(lambda: make(rows, length))
        return jax.tree.map(lambda x: self._pinned(x.dtype, *x.shape), cache)

    def _context(self, count: int) -> Context:
        small = self._pinned(jnp.int32, count), self._pinned(jnp.int32, count, self._width)
        return Context(self._cache(self._model.init_prompt_cache, count, self._width), *small)

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
        return Slots(rows, self._cache(self._model.init_cache, shape.rows, shape.length))

    def _seats(self, shape: Shape) -> Seats:
        if shape.even:
            return Seats(shape.blocks, self._ladder.shards)
        places, number = self._plain(shape.blocks, shape.group), self._plain(shape.rows)
        return Seats(shape.blocks, self._ladder.shards, places, number, number)

    def _seating(self, shape: Shape) -> Seating:
        number = self._plain(shape.rows)
        return Seating(
            source=number,
            fresh=self._plain(shape.rows, dtype=bool),
            token=number,
            limit=number,
            keys=self._plain(shape.rows, 2, dtype=jnp.uint32),
            prompt=self._plain(shape.blocks),
        )
