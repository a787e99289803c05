"""The critic: a value head on a transformer of its own, or on the policy's hidden states (docs/MATH.md, section 1).

``values[n, t]`` is the value before token t, read where its log-probability is read: from the hidden state of the
column in ``source``, in rows of every kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import algo
from grpo_jax.learner.optimizer import CRITIC, Gradient, Sums, accumulate, apply, constrain, join, split
from grpo_jax.models.model import Model
from grpo_jax.types import Params, TrainBatch, TrainState


def critic_decay_mask(model: Model, shared: bool) -> Params:
    """A bool for each of a critic's parameters: matrices decay, and so does the head."""
    return {"head": True} if shared else {"head": True, "trunk": model.decay_mask}


@dataclass(frozen=True, eq=False)
class Critic:
    """The jitted functions of a critic; static in jit, one instance a run.

    Attributes:
        model: of the policy; a trunk of its own has the same shape.
        optimizer: of the critic's parameters.
        schedule: update count -> learning rate, for the metrics.
        shared: the head reads the policy's hidden states, and `Learner.update` trains it.
        value_coef: factor on the value loss's gradient into a shared trunk.
        value_clip: half-width of the band around the old values; None: off.
        microbatch_rows: as the learner's.
        seed: of the run, as the learner's.
    """

    model: Model
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    shared: bool = False
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    microbatch_rows: int | None = None
    seed: int = 0

    @property
    def shardings(self) -> Params:
        """Of its parameters."""
        head = {"head": NamedSharding(self.model.compute.mesh, PartitionSpec())}
        return head if self.shared else head | {"trunk": self.model.param_shardings}

    def init(self, policy: Params) -> TrainState:
        """A head of zeros, so that the first values are 0, and a copy of the policy's transformer where not shared."""
        return self._init({} if self.shared else {"trunk": jax.tree.map(jnp.copy, policy)})

    @partial(jax.jit, static_argnums=0)
    def _init(self, trunk: Params) -> TrainState:
        params = trunk | {"head": jnp.zeros(self.model.spec.width, jnp.float32)}
        state = TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))
        return constrain(self.optimizer, state, self.shardings)

    @partial(jax.jit, static_argnums=0)
    def values(self, params: Params, policy: Params, batch: TrainBatch) -> jax.Array:
        """Values before each completion token.

        Args:
            params: the critic's.
            policy: the policy's parameters, the trunk where it is shared.
            batch: N rows of T tokens.

        Returns:
            [N, T] float32, 0 outside completions.
        """
        trunk = policy if self.shared else params["trunk"]

        def score(part: TrainBatch) -> jax.Array:
            return self.read(self._hidden(trunk, part), params["head"], part)

        return join(jax.lax.map(score, split(batch, self.microbatch_rows, self.model.compute.mesh)))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Sums]:
        """One update of a critic with a trunk of its own, on the rows the policy is updated on.

        Args:
            state: the critic's, donated.
            batch: with ``old_values`` and ``returns``.
        """
        count = self.count(batch)

        def loss(params: Params, part: TrainBatch) -> tuple[jax.Array, tuple[Sums, dict[str, jax.Array]]]:
            value, sums = self.loss(self._hidden(params["trunk"], part), params["head"], part, count)
            return value, (sums, {})

        parts = split(batch, self.microbatch_rows, self.model.compute.mesh)
        gradient = accumulate(loss, state.params, parts, self.shardings)
        return self.step(state, gradient, gradient.of, gradient.fine(gradient.of) & (count > 0))

    def step(self, state: TrainState, gradient: Gradient, grads: Params, fine: jax.Array) -> tuple[TrainState, Sums]:
        """The state after ``grads``, and the gradient's metrics with those of the step."""
        one = jnp.ones((), jnp.float32)
        sums = gradient.sums | {
            "critic/grad_norm": (optax.tree.norm(grads), one),
            "critic/learning_rate": (jnp.asarray(self.schedule(state.step), jnp.float32), one),
            "critic/skipped_update_count": (1.0 - fine, jnp.zeros((), jnp.float32)),
        }
        return apply(self.optimizer, state, grads, fine, self.shardings, (self.seed, CRITIC)), sums

    def count(self, batch: TrainBatch) -> jax.Array:
        """Tokens whose value is learned: the trained ones of completions that were scored."""
        return jnp.sum(self._mask(batch), dtype=jnp.int32)

    def loss(self, hidden: jax.Array, head: jax.Array, batch: TrainBatch, count: jax.Array) -> tuple[jax.Array, Sums]:
        """The clipped value loss of a microbatch as its share of the step's ``count`` tokens, and its metrics."""
        if self.shared:  # the value is the same; its gradient into the trunk is scaled
            fixed = jax.lax.stop_gradient(hidden)
            hidden = fixed + self.value_coef * (hidden - fixed)
        assert batch.returns is not None
        value, sums = algo.value_loss(
            self.read(hidden, head, batch),
            batch.old_values,
            batch.returns,
            self._mask(batch),
            clip=self.value_clip,
            denominators=algo.Denominators(count, count),
        )
        return value, {f"critic/{name}": pair for name, pair in sums.items()}

    def read(self, hidden: jax.Array, head: jax.Array, batch: TrainBatch) -> jax.Array:
        """Hidden states [N, T, D] -> the value before each completion token [N, T] float32, 0 elsewhere."""
        assert batch.sample_ids is not None
        after = jnp.einsum("ntd,d->nt", hidden.astype(jnp.float32), head, precision="highest")
        return jnp.where(batch.sample_ids >= 0, jnp.take_along_axis(after, batch.source, axis=1), 0.0)

    def _mask(self, batch: TrainBatch) -> jax.Array:
        assert batch.returns is not None
        return batch.mask & ~jnp.isnan(batch.returns)

    def _hidden(self, trunk: Params, batch: TrainBatch) -> jax.Array:
        return self.model.hidden(trunk, *batch.rows)
