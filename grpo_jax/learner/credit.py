"""Advantages that are made of what the learner computed: a critic's values, the KL in the reward.

The tokens of a rollout are brought into one table, a row a completion [N, C] (C: the longest completion allowed),
whatever rows they were packed into. There docs/MATH.md, sections 1 (gae) and 4 (the KL in the reward), hold as they are
written: statistics are of the whole rollout, for any packing, minibatches and mesh (contract 5), at one shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import algo
from grpo_jax.config import AlgorithmConfig
from grpo_jax.mesh import batch_sharding
from grpo_jax.scoring import Scored, estimate
from grpo_jax.types import TrainBatch


class Tokens(NamedTuple):
    """The completion tokens of one update, [n, C] each, in the order they were sampled.

    Attributes:
        completion: bool, there is a token.
        mask: bool, it is trained.
        k1: log q - log reference, q the policy that sampled; None without a KL in the reward.
        values: the critic's; None without one.
    """

    completion: jax.Array
    mask: jax.Array
    k1: jax.Array | None
    values: jax.Array | None


class Credit(NamedTuple):
    """What each token is credited with.

    Attributes:
        advantages: [N, C].
        returns: [N, C], NaN for completions that were not scored; None without a critic.
        figures: metrics of the rollout, scalars.
    """

    advantages: jax.Array
    returns: jax.Array | None
    figures: dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Creditor:
    """Gives the parts of a rollout their advantages; static in jit, one instance a run.

    Attributes:
        algorithm: what they are.
        sample_count: completions in one update (n).
        limit: tokens of the longest completion (C).
        mesh: where rows lie.
    """

    algorithm: AlgorithmConfig
    sample_count: int
    limit: int
    mesh: Mesh

    def assign(
        self, parts: Sequence[TrainBatch], scored: Scored, lengths: np.ndarray, kl_coef: Any
    ) -> tuple[list[TrainBatch], Scored, dict[str, jax.Array]]:
        """The parts with advantages (and returns), the rollout with each completion's mean advantage, and metrics.

        Args:
            parts: of one rollout, in its order, with what the learner computed.
            scored: the rollout's rewards.
            lengths: [N] completion tokens.
            kl_coef: coefficient of the KL in the reward.
        """
        shape = scored.reward.shape
        tables = [self.tokens(part) for part in parts]
        credit = self.credit(tables, scored.reward, scored.valid, lengths.reshape(shape), scored.greedy, kl_coef)
        placed = [self.place(part, credit, np.int32(i * self.sample_count)) for i, part in enumerate(parts)]
        figures = dict(credit.figures)
        return placed, replace(scored, advantages=np.asarray(figures.pop("advantages"))), figures

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @partial(jax.jit, static_argnums=0)
    def tokens(self, batch: TrainBatch) -> Tokens:
        """Bring rows of any kind into the table of completions."""
        assert batch.sample_ids is not None and batch.places is not None
        size = self.sample_count * self.limit
        place = jnp.where(batch.sample_ids >= 0, batch.sample_ids * self.limit + batch.places, size)

        def table(x: jax.Array) -> jax.Array:
            flat = jnp.zeros(size, x.dtype).at[place].set(x, mode="drop")
            return jax.lax.with_sharding_constraint(flat.reshape(self.sample_count, self.limit), self._everywhere)

        k1 = None
        if self.algorithm.loss.kl_in_reward:  # type: ignore[attr-defined]
            q = batch.sampler_logp if batch.old_logp is None else batch.old_logp
            assert batch.ref_logp is not None
            k1 = table(jnp.where(batch.mask, q - batch.ref_logp, 0.0))
        values = None if batch.old_values is None else table(batch.old_values)
        return Tokens(table(batch.sample_ids >= 0), table(batch.mask), k1, values)

    @partial(jax.jit, static_argnums=0)
    def credit(
        self,
        parts: list[Tokens],
        reward: jax.Array,
        valid: jax.Array,
        lengths: jax.Array,
        greedy: jax.Array | None,
        kl_coef: jax.Array,
    ) -> Credit:
        """Advantages of the whole rollout from its rewards [Q, G], by gae or by the estimator over groups."""
        tokens = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        if self.algorithm.has_critic:
            credit = self._gae(tokens, reward, valid, kl_coef)
        else:
            credit = self._of_groups(tokens, reward, valid, lengths, greedy, kl_coef)
        return jax.lax.with_sharding_constraint(credit, self._everywhere)

    def _of_groups(
        self,
        tokens: Tokens,
        reward: jax.Array,
        valid: jax.Array,
        lengths: jax.Array,
        greedy: jax.Array | None,
        kl_coef: jax.Array,
    ) -> Credit:
        """The estimator over groups, of r - beta sum k1."""
        assert tokens.k1 is not None
        cost = kl_coef * jnp.sum(tokens.k1, axis=1)
        advantages = estimate(self.algorithm, reward - cost.reshape(reward.shape), valid, lengths, greedy).reshape(-1)
        figures = {"advantages": advantages, "kl_in_reward": jnp.mean(cost)}
        return Credit(jnp.where(tokens.completion, advantages[:, None], 0.0), None, figures)

    def _gae(self, tokens: Tokens, reward: jax.Array, valid: jax.Array, kl_coef: jax.Array) -> Credit:
        """Token by token, from the critic's values."""
        assert tokens.values is not None
        scored = valid.reshape(-1)
        penalty = None if tokens.k1 is None else kl_coef * tokens.k1
        advantages, returns = algo.gae(
            jnp.where(scored, reward.reshape(-1), jnp.nan),
            tokens.values,
            tokens.completion,
            gamma=self.algorithm.gamma,
            lam=self.algorithm.lam,
            penalty=penalty,
        )
        trained = tokens.mask & scored[:, None]
        figures = _explained(tokens.values, returns, trained)
        if penalty is not None:
            figures["kl_in_reward"] = jnp.sum(penalty) / len(scored)
        if self.algorithm.whiten:
            advantages = algo.whiten(advantages, trained)
        advantages = algo.clip_symmetric(advantages, self.algorithm.advantage_clip)
        count = jnp.maximum(tokens.completion.sum(1), 1)
        figures["advantages"] = jnp.where(tokens.completion, advantages, 0.0).sum(1) / count
        return Credit(advantages, jnp.where(scored[:, None], returns, jnp.nan), figures)

    @partial(jax.jit, static_argnums=0)
    def place(self, batch: TrainBatch, credit: Credit, first: jax.Array | np.int32) -> TrainBatch:
        """Bring the credit of the completions from ``first`` on back into the rows of their update."""
        ids, places = batch.sample_ids, batch.places
        assert ids is not None and places is not None
        at = (first + ids, places)

        def rows(x: jax.Array, elsewhere: float) -> jax.Array:
            placed = jnp.where(ids >= 0, x[at], elsewhere)
            return jax.lax.with_sharding_constraint(placed, batch_sharding(self.mesh))

        returns = None if credit.returns is None else rows(credit.returns, jnp.nan)
        return replace(batch, advantages=rows(credit.advantages, 0.0), returns=returns)


def _explained(values: jax.Array, returns: jax.Array, trained: jax.Array) -> dict[str, jax.Array]:
    """What the old values tell of the returns; the explained variance of returns that do not differ is 0."""
    count = jnp.maximum(trained.sum(), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(trained, x, 0.0).sum() / count

    def variance(x: jax.Array) -> jax.Array:
        return mean(jnp.square(x - mean(x)))

    spread = variance(returns)
    explained = 1 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
    return {
        "critic/explained_variance": jnp.where(spread > 0, explained, 0.0),
        "critic/value": mean(values),
        "critic/return": mean(returns),
    }
