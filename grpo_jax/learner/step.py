"""The learner: the log-probabilities of a batch, and one jitted, donated update.

An update sees its whole optimizer step: denominators, and which tokens a statistic picks, are settled over it before
the first microbatch, so that microbatches, padding, packing and meshes change memory and time, never the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax import algo
from grpo_jax.algo.spec import LossConfig
from grpo_jax.learner.critic import Critic
from grpo_jax.learner.optimizer import POLICY, Sums, accumulate, apply, constrain, join, split
from grpo_jax.models import Model, Routed, balance_loss, router_metrics
from grpo_jax.types import Params, TrainBatch, TrainState


class Dials(NamedTuple):
    """Coefficients that move from step to step, scalars handed in so that nothing recompiles; None: the loss's own.

    Attributes:
        kl_coef: of the KL.
        entropy_coef: of the entropy bonus.
    """

    kl_coef: Any = None
    entropy_coef: Any = None


OWN = Dials()
"""The loss's own coefficients."""


class Counts(NamedTuple):
    """What a microbatch is told of its whole optimizer step.

    Attributes:
        policy: denominators of its loss.
        values: tokens of the critic's.
        load: [layers, E], of the trained tokens, where the router has a loss.
    """

    policy: algo.Denominators
    values: jax.Array | None = None
    load: jax.Array | None = None


@dataclass(frozen=True, eq=False)
class Learner:
    """The jitted functions of one run; static in jit, one instance a run.

    Attributes:
        model: whose parameters are trained.
        loss: what is minimised.
        optimizer: from `make_optimizer`.
        schedule: update count -> learning rate, for the metrics.
        scored_len: most trained tokens a padded or packed row can have (S); only their hidden states meet the
            vocabulary.
        temperature: of the sampler, so that all log-probabilities are of one distribution.
        microbatch_rows: rows whose activations are alive at once; it divides their number. None: all of them.
        segmented: rows hold several sequences.
        seed: with an update's number the address of what the loss (clip_cov) and the rounding to bfloat16 draw.
        critic: one that shares the policy's trunk and is trained with it; None without.
        follow: alpha and every of a reference that follows the policy; None where it stays.
        router_coef: factor of the load-balance loss of a mixture of experts; 0 leaves it out.
    """

    model: Model
    loss: LossConfig
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    scored_len: int
    temperature: float = 1.0
    microbatch_rows: int | None = None
    segmented: bool = False
    seed: int = 0
    critic: Critic | None = None
    follow: tuple[float, int] | None = None
    router_coef: float = 0.0

    @property
    def shardings(self) -> Params:
        """Of what is trained."""
        return self.model.trained(self.model.param_shardings)

    def init(self, params: Params) -> TrainState:
        """The state before the first update; the optimizer's is sharded like what is trained.

        A frozen base is not copied: the first update donates it with the rest of the state.
        """
        return replace(self._init(self.model.trained(params)), frozen=self.model.frozen(params))

    @partial(jax.jit, static_argnums=0)
    def _init(self, trained: Params) -> TrainState:
        state = TrainState(trained, self.optimizer.init(trained), jnp.zeros((), jnp.int32))
        return constrain(self.optimizer, state, self.shardings)

    def params(self, state: TrainState) -> Params:
        """The policy's parameters: what is trained, and the base it is trained on."""
        return self.model.joined(state.params, state.frozen)

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, params: Params, batch: TrainBatch) -> jax.Array:
        """Log-probabilities of the trained tokens under ``params``.

        Returns:
            [N, T] float32, 0 where not trained.
        """
        return join(jax.lax.map(lambda part: self._score(params, part)[0], self._split(batch)))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(
        self, state: TrainState, batch: TrainBatch, sequences: jax.Array, dials: Dials = OWN
    ) -> tuple[TrainState, Sums, dict]:
        """One optimizer update; nothing changes when nothing is trained or the gradient is not finite.

        Args:
            state: donated.
            batch: N rows of T tokens; without ``old_logp`` the batch is trained on the weights that sampled it.
            sequences: scalar int32, completions sampled for this update, the empty and filtered ones among them.
            dials: this update's coefficients.

        Returns:
            (state, sums, maxima): sums are (sum, count), maxima scalars.
        """
        segments = batch.segment_ids if self.segmented else None
        counts = Counts(algo.denominators(self.loss, batch.mask, segments=segments, sequences=sequences))
        trained = {"policy": state.params}
        shardings = {"policy": self.shardings}
        if self.critic is not None:
            assert state.critic is not None
            counts = counts._replace(values=self.critic.count(batch))
            trained, shardings = trained | state.critic.params, shardings | self.critic.shardings
        if self.router_coef:
            counts = counts._replace(load=self._load(self.params(state), batch))
        loss = partial(self._loss, frozen=state.frozen, counts=counts, dials=dials)
        parts = self._split((batch, self._choose(state, batch)))
        gradient = accumulate(lambda params, part: loss(params, *part), trained, parts, shardings)
        fine = gradient.fine(gradient.of) & (counts.policy.tokens > 0)
        one = jnp.ones((), jnp.float32)
        sums = gradient.sums | {
            "grad_norm": (optax.tree.norm(gradient.of["policy"]), one),
            "learning_rate": (jnp.asarray(self.schedule(state.step), jnp.float32), one),
            "skipped_update_count": (1.0 - fine, jnp.zeros((), jnp.float32)),
        }
        new = apply(self.optimizer, state, gradient.of["policy"], fine, self.shardings, (self.seed, POLICY))
        if self.critic is not None and state.critic is not None:
            head = {"head": gradient.of["head"]}
            critic, more = self.critic.step(state.critic, gradient, head, fine)
            new, sums = replace(new, critic=critic), more | sums
        return self._follow(new, fine), sums, gradient.maxima

    def _choose(self, state: TrainState, batch: TrainBatch) -> algo.Choice | None:
        """The tokens that a statistic of the whole step picks, from a pass without gradient; None if none does."""
        if not self.loss.chooses:
            return None
        logp, entropy = join(jax.lax.map(lambda part: self._score(self.params(state), part), self._split(batch)))
        return algo.choose(
            self.loss,
            batch.mask,
            batch.segment_ids if self.segmented else None,
            logp=logp,
            old_logp=batch.old_logp,
            advantages=batch.advantages,
            entropy=entropy,
            key=jax.random.fold_in(jax.random.key(self.seed), state.step),
            row_ids=batch.sample_ids,
            positions=batch.places,
        )

    def _follow(self, state: TrainState, fine: jax.Array) -> TrainState:
        """The reference moved towards the policy where it is time, never by a skipped update (MATH, section 4)."""
        if self.follow is None:
            return state
        alpha, every = self.follow
        step = jnp.where(fine, state.step, 0)
        reference = algo.follow_reference(state.reference, state.params, step, alpha=alpha, every=every)
        return replace(state, reference=jax.lax.with_sharding_constraint(reference, self.model.param_shardings))

    def _loss(
        self,
        trained: Params,
        batch: TrainBatch,
        choice: algo.Choice | None,
        frozen: Params | None,
        counts: Counts,
        dials: Dials,
    ) -> tuple[jax.Array, tuple[Sums, dict]]:
        policy = self.model.joined(trained["policy"], frozen)
        hidden, routed = self._routed(policy, batch) if self.router_coef else (self._hidden(policy, batch), None)
        logp, entropy = self._read(policy, hidden, batch)
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
            denominators=counts.policy,
            kl_coef=dials.kl_coef,
            entropy_coef=dials.entropy_coef,
            choice=choice,
        )
        gap = jnp.where(batch.mask, jnp.abs(old_logp - batch.sampler_logp), 0.0)
        count = batch.mask.sum().astype(jnp.float32)
        sums = sums | {"sampler_logp_difference/mean": (gap.sum(), count)}
        if self.critic is not None:
            assert counts.values is not None
            value, more = self.critic.loss(hidden, trained["head"], batch, counts.values)
            loss, sums = loss + value, sums | more
        maxima = {"sampler_logp_difference/max": gap.max()}
        if routed is not None:
            assert counts.load is not None
            each = balance_loss(routed.probs, counts.load, counts.policy.tokens)
            total = jnp.where(batch.mask, each, 0.0).sum()
            loss = loss + self.router_coef * total / jnp.maximum(counts.policy.tokens, 1)
            sums, maxima = sums | {"router/balance": (total, count)}, maxima | router_metrics(counts.load)
        return loss, (sums, maxima)

    def _hidden(self, params: Params, batch: TrainBatch) -> jax.Array:
        return self.model.hidden(params, *batch.rows)

    def _routed(self, params: Params, batch: TrainBatch) -> tuple[jax.Array, Routed]:
        return self.model.hidden_routed(params, *batch.rows, batch.mask)

    def _load(self, params: Params, batch: TrainBatch) -> jax.Array:
        """Where the whole step's trained tokens go, [layers, E], from a pass without gradient (contract 5)."""
        return jax.lax.map(lambda part: self._routed(params, part)[1].load, self._split(batch)).sum(axis=0)

    def _score(self, params: Params, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        return self._read(params, self._hidden(params, batch), batch)

    def _read(self, params: Params, hidden: jax.Array, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy [N, T] of the trained tokens, 0 elsewhere; only they meet the vocabulary."""
        rows, width = batch.tokens.shape
        column = self._scored_columns(batch)
        scored = column.shape[1]
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

    def _scored_columns(self, batch: TrainBatch) -> jax.Array:
        """[N, S] int32, columns among which all trained ones are."""
        rows, width = batch.tokens.shape
        if batch.shared is not None:
            return jnp.broadcast_to(jnp.arange(batch.shared.prompt_len, width), (rows, width - batch.shared.prompt_len))
        return jnp.argsort(~batch.mask, axis=1, stable=True)[:, : self.scored_len]

    def _split(self, batch: Any) -> Any:
        return split(batch, self.microbatch_rows, self.model.compute.mesh)
