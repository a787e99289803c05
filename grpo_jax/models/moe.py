"""A mixture of experts in place of the MLP: every token goes to its best experts, none is dropped.

Tokens are sorted by expert and each expert's are one group of a ragged product (Gale et al. 2022), so that shapes do
not depend on the routing and nothing is compiled twice. Experts are cut over the mesh axis ``expert``, their inner
width over ``tensor``: each device computes its experts' share for all tokens of its rows, and the shares are added.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.mesh import GATHERED_RULES, spec_for
from grpo_jax.models.layers import ACTIVATION_FUNCTIONS, Compute, Linear, Weight
from grpo_jax.models.spec import LayerSpec, MoESpec

BY_EXPERT = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
"""Rows [n, in], in groups, times weights [E, out, in]."""


class Routing(NamedTuple):
    """Where tokens went: ``probs`` [..., E] of the router, float32, and ``chosen`` [..., k] int32, best first."""

    probs: jax.Array
    chosen: jax.Array


def expert_weights(moe: MoESpec, width: int) -> tuple[Weight, Weight, Weight]:
    """Declarations of gate and up [E, F, D] and down [E, D, F]."""
    into = Weight((moe.experts, moe.ffn, width), ("experts", "ffn", "embed"))
    return into, into, Weight((moe.experts, width, moe.ffn), ("experts", "embed", "ffn"))


class Experts(nnx.Module):
    """The weights of E MLPs."""

    def __init__(self, moe: MoESpec, width: int):
        """See ``expert_weights``."""
        self.gate, self.up, self.down = (nnx.Param(weight) for weight in expert_weights(moe, width))


class MoE(nnx.Module):
    """``sum_e w_e down_e(activation(gate_e(x)) * up_e(x))`` over a token's k best (Shazeer et al. 2017)."""

    def __init__(self, compute: Compute, layer: LayerSpec, moe: MoESpec):
        """The router is [E, D]."""
        self.compute, self.moe, self.activation = compute, moe, layer.activation
        self.router = Linear(compute, {":experts": moe.experts}, {"embed": layer.width})
        self.experts = Experts(moe, layer.width)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """[..., D] -> [..., D], and where the tokens went."""
        probs = jax.nn.softmax(self.router(x, out=jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.moe.top)
        if self.moe.normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return self._mixed(x, weights, chosen), Routing(probs, chosen)

    def _mixed(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """The weighted sum of the experts' outputs: each device's rows over its part of the experts, then added."""
        mesh, kernels = self.compute.mesh, [w[...] for w in (self.experts.gate, self.experts.up, self.experts.down)]
        rows = spec_for(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)
        cuts = [spec_for(w.axes, w.shape, mesh, GATHERED_RULES) for w in expert_weights(self.moe, x.shape[-1])]
        over, across = cuts[0][0], cuts[0][1]  # mesh axes of the experts and of their inner width, or None

        def local(x: jax.Array, weights: jax.Array, chosen: jax.Array, *kernels: jax.Array) -> jax.Array:
            first = 0 if over is None else jax.lax.axis_index(over) * kernels[0].shape[0]
            # Said aloud: a gather whose indices alone differ over an axis loses the other devices' gradient (jax 0.10).
            varying = x if over is None else jax.lax.pcast(x, over, to="varying")
            flat = [value.reshape(-1, value.shape[-1]) for value in (varying, weights, chosen - first)]
            share = self._share(*flat, *kernels)
            return jax.lax.psum(share, tuple(axis for axis in (over, across) if axis is not None)).reshape(x.shape)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, *cuts), out_specs=rows)
        return mapped(x, weights, chosen, *kernels).astype(self.compute.dtype)

    def _share(
        self, x: jax.Array, weights: jax.Array, chosen: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
    ) -> jax.Array:
        """x [n, D], weights and chosen [n, k] -> [n, D] float32. Experts not in [0, the number here) add nothing."""
        count, top = gate.shape[0], chosen.shape[1]
        group = jnp.where((chosen >= 0) & (chosen < count), chosen, count).reshape(-1)
        order = jnp.argsort(group, stable=True)
        sizes = jnp.bincount(group, length=count + 1)[:count]

        def each(rows: jax.Array, kernel: jax.Array, out: str) -> jax.Array:
            return jax.lax.ragged_dot_general(
                rows, kernel, sizes, BY_EXPERT, precision=self.compute.precision, preferred_element_type=out
            )

        # What a ragged product gives beyond its groups, and the gradient of it, is not defined.
        mine = (group[order] < count)[:, None]
        rows, dtype = jnp.where(mine, x[order // top], 0), self.compute.dtype
        inner = ACTIVATION_FUNCTIONS[self.activation](each(rows, gate, dtype)) * each(rows, up, dtype)
        outer = jnp.where(mine, each(inner, down, "float32"), 0)
        back = jnp.argsort(order)
        return (weights[..., None] * outer[back].reshape(-1, top, x.shape[1])).sum(axis=1)


def expert_load(routing: Routing, valid: jax.Array) -> jax.Array:
    """How many of the tokens that are ``valid`` [...] bool went to each expert: [E] float32, their sum k a token."""
    ones = jnp.broadcast_to(valid[..., None], routing.chosen.shape).astype(jnp.float32)
    return jnp.bincount(routing.chosen.reshape(-1), ones.reshape(-1), length=routing.probs.shape[-1])


def balance_loss(probs: jax.Array, load: jax.Array, tokens: jax.Array) -> jax.Array:
    """The load-balance loss of each token [N, T] float32 (Fedus et al. 2021, equation 4); its mean is the loss.

    It is E times the sum over experts of the share of all tokens that went there and the token's probability of going
    there, which is k where the load is even.

    Args:
        probs: [N, T, E], with gradient, see ``Routed``.
        load: [layers, E], of the whole optimizer step, without gradient.
        tokens: [] how many tokens of the step ``load`` counts.
    """
    share = jax.lax.stop_gradient(load).sum(axis=0) / (load.shape[0] * jnp.maximum(tokens, 1))
    return probs.shape[-1] * jnp.einsum("nte,e->nt", probs, share, precision="highest")


def router_metrics(load: jax.Array) -> dict[str, jax.Array]:
    """Figures of ``load`` [layers, E]: the busiest expert's load as a multiple of an even share, and unused experts."""
    even = load.sum(axis=-1, keepdims=True) / load.shape[-1]
    return {"router/busiest": (load / even).max(), "router/unused": (load == 0).mean()}
